use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use super::*;

const NOW: Tick = Tick(1000);
const AGEING: u32 = 3000;

fn config(capacity: usize) -> FdbConfig {
    FdbConfig {
        capacity,
        ageing_ticks: AGEING,
        move_hold_ticks: 0,
        seed: 7,
    }
}

fn mac(n: u64) -> MacAddr {
    MacAddr::from_u64(0x0200_0000_0000 | n)
}

fn port(n: u16) -> PortId {
    PortId::new(n).unwrap()
}

#[test]
fn a_station_is_learned_refreshed_and_moved() {
    let fdb = Fdb::new(config(8));
    assert_eq!(fdb.lookup(mac(1), NOW), None);
    assert_eq!(fdb.learn(mac(1), port(1), NOW), Learned::New);
    assert_eq!(fdb.learn(mac(1), port(1), NOW), Learned::Refreshed);
    assert_eq!(fdb.lookup(mac(1), NOW), Some(port(1)));
    assert_eq!(
        fdb.learn(mac(1), port(4095), NOW),
        Learned::Moved { from: port(1) }
    );
    assert_eq!(fdb.lookup(mac(1), NOW), Some(port(4095)));
    assert_eq!(
        (fdb.count(port(1)), fdb.count(port(4095)), fdb.len()),
        (0, 1, 1)
    );
}

#[test]
fn an_entry_expires_once_it_is_older_than_the_ageing() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), NOW);
    let last = Tick(NOW.0 + AGEING);
    assert_eq!(
        (fdb.lookup(mac(1), last), fdb.age(last)),
        (Some(port(1)), 0)
    );
    let expired = Tick(last.0 + 1);
    assert_eq!((fdb.lookup(mac(1), expired), fdb.age(expired)), (None, 1));
    assert!(fdb.is_empty());
}

#[test]
fn a_refresh_prolongs_an_entry_and_never_ages_it() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), NOW);
    fdb.learn(mac(1), port(1), Tick(2000));
    fdb.learn(mac(1), port(1), Tick(1999));
    assert_eq!(fdb.lookup(mac(1), Tick(2000 + AGEING)), Some(port(1)));
}

#[test]
fn ticks_wrap_and_may_come_from_the_future() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), Tick(u32::MAX));
    assert_eq!(fdb.lookup(mac(1), Tick(u32::MAX - 5)), Some(port(1)));
    assert_eq!(fdb.lookup(mac(1), Tick(5)), Some(port(1)));
    fdb.learn(mac(1), port(1), Tick(5));
    assert_eq!(fdb.lookup(mac(1), Tick(5 + AGEING)), Some(port(1)));
    assert_eq!(fdb.age(Tick(6 + AGEING)), 1);
}

#[test]
fn a_static_entry_neither_moves_nor_ages_nor_is_flushed() {
    let fdb = Fdb::new(config(8));
    fdb.add_static(mac(1), port(1)).unwrap();
    let later = Tick(1 << 30);
    assert_eq!(fdb.learn(mac(1), port(2), later), Learned::Static);
    assert_eq!(fdb.learn(mac(1), port(1), later), Learned::Refreshed);
    assert_eq!((fdb.age(later), fdb.flush(|_, _| true)), (0, 0));
    assert_eq!(fdb.lookup(mac(1), later), Some(port(1)));
    assert_eq!(fdb.count(port(1)), 0);
    assert_eq!(fdb.purge_port(port(1)), 1);
    assert_eq!(fdb.lookup(mac(1), later), None);
}

#[test]
fn what_was_learned_behind_a_port_is_forgotten_at_once_and_swept_later() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), NOW);
    fdb.learn(mac(2), port(2), NOW);
    fdb.add_static(mac(3), port(1)).unwrap();
    // It needs no lock: a worker may flush, and housekeeping may sweep meanwhile.
    let writer = fdb.lock();
    assert!(fdb.flush_port(port(1)));
    assert!(!fdb.flush_port(port(1)), "nothing was learned since");
    drop(writer);
    assert_eq!(
        [1, 2, 3].map(|n| fdb.lookup(mac(n), NOW)),
        [None, Some(port(2)), Some(port(1))]
    );
    assert_eq!((fdb.count(port(1)), fdb.len()), (0, 3));
    assert_eq!((fdb.sweep_flushed(), fdb.sweep_flushed()), (1, 0));
    assert_eq!(fdb.len(), 2);
    assert_eq!(fdb.learn(mac(1), port(2), NOW), Learned::New);
    assert_eq!(fdb.lookup(mac(1), NOW), Some(port(2)));
}

#[test]
fn an_address_in_use_does_not_move_unless_it_is_announced_or_its_port_goes_down() {
    const HOLD: u32 = 10;
    let fdb = Fdb::new(FdbConfig {
        move_hold_ticks: HOLD,
        ..config(8)
    });
    let [a, b] = [1, 2].map(port);
    let at = |ticks| Tick(NOW.0 + ticks);
    fdb.learn(mac(1), a, NOW);
    assert_eq!(fdb.learn(mac(1), b, at(HOLD - 1)), Learned::Held { at: a });
    assert_eq!(fdb.lookup(mac(1), NOW), Some(a));
    // It is the holder's frames that count, not the other's.
    assert_eq!(fdb.learn(mac(1), b, at(HOLD)), Learned::Moved { from: a });
    assert_eq!(fdb.learn(mac(1), a, at(HOLD)), Learned::Held { at: b });
    let announced = fdb.announce(mac(1), a, at(HOLD));
    assert_eq!(announced, Learned::Moved { from: b });
    fdb.flush_port(a);
    assert_eq!(fdb.learn(mac(1), b, at(HOLD)), Learned::New);
    // A limit does not make a spoof look like a full port.
    fdb.set_limit(a, Some(0));
    assert_eq!(fdb.learn(mac(1), a, at(HOLD)), Learned::Held { at: b });
    let of_b = FdbTally {
        moves: 1,
        moves_refused: 1,
        ..FdbTally::default()
    };
    assert_eq!(fdb.tally(b), of_b);
    let of_a = FdbTally {
        moves: 1,
        moves_refused: 2,
        ..FdbTally::default()
    };
    assert_eq!(fdb.tally(a), of_a);
    fdb.purge_port(a);
    assert_eq!(fdb.tally(a), FdbTally::default());
}

/// One port fills the database; everybody else is learned all the same, up to the fair share.
#[test]
fn a_flood_of_addresses_locks_nobody_out_and_evicts_nobody_else() {
    const CAPACITY: u32 = 1024;
    let fdb = Fdb::new(config(CAPACITY as usize));
    let [flooder, a, b] = [1, 2, 3].map(port);
    let stations = |port: u16| (0..100).map(move |n| mac(u64::from(port) << 32 | n));
    fdb.add_static(mac(1 << 39), a).unwrap();
    for station in stations(2) {
        assert_eq!(fdb.learn(station, a, NOW), Learned::New);
    }
    for n in 0..100_000 {
        fdb.learn(mac(n), flooder, NOW);
    }
    assert_eq!(fdb.len(), CAPACITY as usize);
    for station in stations(3) {
        // The flooder goes on, and gets nothing back.
        assert_eq!(fdb.learn(mac(1 << 24), flooder, NOW), Learned::Full);
        assert_eq!(fdb.learn(station, b, NOW), Learned::New);
    }
    assert!(stations(2).all(|mac| fdb.lookup(mac, NOW) == Some(a)));
    assert!(stations(3).all(|mac| fdb.lookup(mac, NOW) == Some(b)));
    assert_eq!(fdb.lookup(mac(1 << 39), NOW), Some(a));
    assert_eq!(fdb.tally(flooder).evictions, 100);
    assert_eq!(fdb.tally(a).evictions + fdb.tally(b).evictions, 0);

    // Once each has its share, a full database is full.
    let learned = (0..10_000).filter(|n| fdb.learn(mac(1 << 25 | n), b, NOW) == Learned::New);
    assert_eq!(learned.count() + 100, CAPACITY as usize / 3);
    assert_eq!(fdb.learn(mac(1 << 26), b, NOW), Learned::Full);
    // An operator's entry finds room.
    fdb.add_static(mac(1 << 27), b).unwrap();
    assert_eq!(fdb.len(), CAPACITY as usize);
}

#[test]
fn what_expired_or_was_flushed_makes_room_first() {
    for flushed in [true, false] {
        let fdb = Fdb::new(config(32));
        (0..31).for_each(|n| _ = fdb.learn(mac(n), port(1), Tick(NOW.0 + AGEING)));
        fdb.learn(mac(31), port(2), NOW);
        let now = Tick(NOW.0 + AGEING + u32::from(!flushed));
        if flushed {
            fdb.flush_port(port(2));
        }
        // It may take a few frames until the search comes by.
        let learned = (0..100).find(|_| fdb.learn(mac(32), port(3), now) == Learned::New);
        assert!(learned.is_some());
        assert!(fdb.tally(port(1)).evictions <= 1);
    }
}

#[test]
fn no_entry_of_before_comes_back_however_often_a_port_goes_down() {
    let fdb = Fdb::new(config(64));
    let mut learned = 0;
    for n in 0..40 {
        learned += usize::from(fdb.learn(mac(n), port(1), NOW) == Learned::New);
        fdb.flush_port(port(1));
        assert!((0..=n).all(|n| fdb.lookup(mac(n), NOW).is_none()), "{n}");
    }
    assert_eq!((learned, fdb.sweep_flushed()), (15, 15));
    assert_eq!(fdb.learn(mac(1), port(1), NOW), Learned::New);
}

#[test]
fn a_static_entry_takes_over_a_learned_one() {
    let fdb = Fdb::new(config(1));
    fdb.learn(mac(1), port(1), NOW);
    fdb.add_static(mac(1), port(2)).unwrap();
    assert_eq!(fdb.lookup(mac(1), NOW), Some(port(2)));
    assert_eq!(
        (fdb.count(port(1)), fdb.count(port(2)), fdb.len()),
        (0, 0, 1)
    );
    let full = FdbError::Full {
        len: 1,
        capacity: 1,
    };
    assert_eq!(fdb.add_static(mac(2), port(1)), Err(full));
}

#[test]
fn addresses_of_no_station_are_refused() {
    let fdb = Fdb::new(config(8));
    let group = MacAddr([1, 0, 0, 0, 0, 1]);
    assert_eq!(
        fdb.add_static(group, port(1)),
        Err(FdbError::GroupAddress { mac: group })
    );
    assert_eq!(
        fdb.add_static(MacAddr([0; 6]), port(1)),
        Err(FdbError::ZeroAddress)
    );
    assert_eq!(
        fdb.learn(MacAddr::BROADCAST, port(1), NOW),
        Learned::NotUnicast
    );
    assert_eq!(
        fdb.learn(MacAddr([0; 6]), port(1), NOW),
        Learned::NotUnicast
    );
    assert!(fdb.is_empty());
}

#[test]
fn a_limit_holds_for_new_and_moving_addresses_of_its_port() {
    let fdb = Fdb::new(config(8));
    fdb.set_limit(port(1), Some(1));
    assert_eq!(fdb.learn(mac(1), port(1), NOW), Learned::New);
    assert_eq!(fdb.learn(mac(2), port(1), NOW), Learned::LimitReached);
    assert_eq!(fdb.learn(mac(2), port(2), NOW), Learned::New);
    assert_eq!(fdb.learn(mac(2), port(1), NOW), Learned::LimitReached);
    assert_eq!(fdb.lookup(mac(2), NOW), Some(port(2)));
    fdb.set_limit(port(1), None);
    assert_eq!(
        fdb.learn(mac(2), port(1), NOW),
        Learned::Moved { from: port(2) }
    );
}

#[test]
fn learning_is_busy_while_another_thread_writes_but_refreshes_go_on() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), NOW);
    let writer = fdb.lock();
    assert_eq!(fdb.learn(mac(1), port(1), Tick(2000)), Learned::Refreshed);
    assert_eq!(fdb.learn(mac(1), port(2), NOW), Learned::Busy);
    assert_eq!(fdb.learn(mac(2), port(1), NOW), Learned::Busy);
    drop(writer);
    assert_eq!(fdb.lookup(mac(1), Tick(2000 + AGEING)), Some(port(1)));
    assert_eq!(fdb.learn(mac(2), port(1), NOW), Learned::New);
}

#[test]
fn a_database_can_be_filled_to_its_capacity_with_addresses_of_any_pattern() {
    const CAPACITY: u32 = 60_000;
    let patterns: [fn(u64) -> u64; 4] = [
        |n| n,
        |n| n << 8,
        |n| n << 24 & !(1 << 40) | (n >> 16 & 1) << 47,
        |n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16 & !(1 << 40),
    ];
    for (i, pattern) in patterns.into_iter().enumerate() {
        for seed in 0..4 {
            let fdb = Fdb::new(FdbConfig {
                seed,
                ..config(60_000)
            });
            let address = |n| MacAddr::from_u64(pattern(u64::from(n)));
            for n in 1..=CAPACITY {
                let learned = fdb.learn(address(n), port(1), NOW);
                assert_eq!(learned, Learned::New, "pattern {i}, seed {seed}, {n}");
            }
            assert_eq!(fdb.learn(MacAddr([0xf2; 6]), port(1), NOW), Learned::Full);
            assert!((1..=CAPACITY).all(|n| fdb.lookup(address(n), NOW) == Some(port(1))));
            assert_eq!(fdb.count(port(1)), CAPACITY);
            assert_eq!(fdb.age(Tick(NOW.0 + AGEING + 1)), 60_000);
        }
    }
}

#[test]
fn a_database_takes_32_bytes_per_entry() {
    let fdb = Fdb::new(config(1_000_000));
    assert_eq!(fdb.table.bucket_count() * 64, 32_000_000);
}

#[test]
fn entries_displaced_within_the_table_are_still_found() {
    let fdb = Fdb::with_buckets(config(28), 28, 7); // as many slots as entries
    let known: Vec<_> = (1..200u16)
        .filter(|n| fdb.learn(mac((*n).into()), port(*n), NOW) == Learned::New)
        .collect();
    assert!(known.len() > 24, "{known:?}");
    for n in known {
        assert_eq!(fdb.lookup(mac(n.into()), NOW), Some(port(n)), "{n}");
    }
}

#[test]
fn a_slot_reused_during_a_lookup_is_a_miss() {
    let fdb = Fdb::with_buckets(config(1), 1, 2);
    let probe = |n| fdb.probe(mac(n).to_u64());
    let key = probe(1).key();
    fdb.learn(mac(1), port(1), NOW);
    let (slot, entry) = fdb.table.find(probe(1)).unwrap();
    let is_there = |n| {
        let found = fdb.table.find(probe(n));
        found.is_some_and(|(other, _)| std::ptr::eq(other.value(), slot.value()))
    };
    let other = (2..100).find(|n| {
        fdb.remove(mac(*n - 1));
        fdb.learn(mac(*n), port(2), NOW);
        is_there(*n)
    });
    let other = mac(other.unwrap());

    let first = slot.start_read();
    assert_eq!(
        slot.finish_read(first, key),
        None,
        "the slot was another's all along"
    );
    fdb.remove(other);
    fdb.learn(mac(1), port(1), NOW);
    assert!(is_there(1));
    assert_eq!(
        slot.finish_read(first, key),
        None,
        "the slot was another's at first"
    );

    let first = slot.start_read();
    assert_eq!(
        slot.finish_read(first, key).map(Entry::port),
        Some(entry.port())
    );
    fdb.remove(mac(1));
    assert_eq!(slot.finish_read(first, key), None, "removed meanwhile");
    fdb.learn(other, port(2), NOW);
    assert_eq!(slot.finish_read(first, key), None, "another's by now");
    fdb.remove(other);
    fdb.learn(mac(1), port(3), NOW);
    assert_eq!(slot.finish_read(first, key), None, "another's meanwhile");
}

#[test]
fn a_lookup_during_a_refresh_or_move_finds_the_entry() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), NOW);
    let probe = fdb.probe(mac(1).to_u64());
    let (slot, _) = fdb.table.find(probe).unwrap();
    let first = slot.start_read();
    fdb.learn(mac(1), port(1), Tick(2000));
    assert!(slot.finish_read(first, probe.key()).is_some());
    fdb.learn(mac(1), port(2), Tick(2000));
    assert_eq!(
        slot.finish_read(first, probe.key()).map(Entry::port),
        Some(port(2))
    );
}

#[test]
fn a_slot_reused_during_a_refresh_is_left_alone() {
    let fdb = Fdb::with_buckets(config(1), 1, 2);
    fdb.learn(mac(1), port(1), NOW);
    let (slot, entry) = fdb.table.find(fdb.probe(mac(1).to_u64())).unwrap();
    assert!(slot.refresh(entry, NOW));
    assert!(fdb.remove(mac(1)));
    assert!(!slot.refresh(entry, Tick(2000)), "removed");
    assert!(fdb.is_empty() && fdb.table.find(fdb.probe(mac(1).to_u64())).is_none());
    for n in 1..=16 {
        // Whoever takes the slot, with the very same port and tick, is another era's.
        fdb.learn(mac(n), port(1), NOW);
        assert!(!slot.refresh(entry, Tick(2000)), "re-used");
        fdb.remove(mac(n));
    }
}

#[test]
fn an_entry_refreshed_during_its_removal_is_judged_again() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), NOW);
    let (slot, _) = fdb.table.find(fdb.probe(mac(1).to_u64())).unwrap();
    let refresh = |entry: Entry| slot.refresh(entry, Tick(2000));
    let aged = slot.vacate(|entry| entry.seen() == NOW && refresh(entry));
    assert_eq!(aged, None, "in use again");
    let flushed = slot.vacate(|entry| slot.refresh(entry, Tick(3000)));
    assert_eq!(flushed.map(Entry::seen), Some(Tick(3000)));
}

#[test]
fn a_refresh_of_a_moved_entry_does_not_move_it_back() {
    let fdb = Fdb::new(config(8));
    fdb.learn(mac(1), port(1), NOW);
    let (slot, entry) = fdb.table.find(fdb.probe(mac(1).to_u64())).unwrap();
    fdb.learn(mac(1), port(2), NOW);
    assert!(!slot.refresh(entry, Tick(2000)));
    assert_eq!(fdb.lookup(mac(1), NOW), Some(port(2)));
}

/// Station n is seen behind ports n and n + STATIONS only, in a table so tight that entries are
/// displaced and slots are re-used all the time.
#[test]
fn concurrent_use_never_shows_a_port_of_another_station() {
    const STATIONS: u16 = 40;
    const ROUNDS: u32 = 300_000;
    let fdb = Fdb::with_buckets(config(24), 24, 6);
    let is_running = AtomicBool::new(true);
    let pick = |state: &mut u64| {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        u16::try_from(*state >> 48).unwrap()
    };
    let check = |n: u16, found: Option<PortId>| {
        let found = found.map(PortId::get);
        assert!(
            found.is_none_or(|p| p % STATIONS == n),
            "station {n} at {found:?}"
        );
        u32::from(found.is_some())
    };
    let (fdb, is_running) = (&fdb, &is_running);
    let hits: u32 = std::thread::scope(|scope| {
        let learners: Vec<_> = (1..=2)
            .map(|seed| {
                scope.spawn(move || {
                    let mut state = seed;
                    for round in 0..ROUNDS {
                        let n = pick(&mut state) % STATIONS;
                        let behind = port(n + pick(&mut state) % 2 * STATIONS);
                        fdb.learn(mac(n.into()), behind, Tick(round));
                    }
                })
            })
            .collect();
        let readers: Vec<_> = (3..=4)
            .map(|seed| {
                scope.spawn(move || {
                    let (mut state, mut hits) = (seed, 0);
                    while is_running.load(Ordering::Relaxed) {
                        let n = pick(&mut state) % STATIONS;
                        hits += check(n, fdb.lookup(mac(n.into()), Tick(ROUNDS)));
                    }
                    hits
                })
            })
            .collect();
        scope.spawn(move || {
            let mut state = 5;
            while is_running.load(Ordering::Relaxed) {
                let n = pick(&mut state) % STATIONS;
                match pick(&mut state) % 7 {
                    5 => _ = fdb.flush_port(port(n)),
                    6 => _ = fdb.sweep_flushed(),
                    0 => drop(fdb.flush(|_, at| at == port(n))),
                    1 => drop(fdb.purge_port(port(n))),
                    2 => drop(fdb.age(Tick(ROUNDS / 2))),
                    3 => drop(fdb.remove(mac(n.into()))),
                    _ => drop(fdb.add_static(mac(n.into()), port(n))),
                }
                // Else the others find little to read.
                (0..1000).for_each(|_| std::hint::spin_loop());
            }
        });
        for learner in learners {
            learner.join().unwrap();
        }
        is_running.store(false, Ordering::Relaxed);
        readers
            .into_iter()
            .map(|reader| reader.join().unwrap())
            .sum()
    });
    assert!(hits > 0);

    let mut seen = HashMap::new();
    let mut learned = HashMap::<_, u32>::new();
    fdb.for_each(|mac, port, is_static, _| {
        assert_eq!(seen.insert(mac, port), None, "two entries of {mac:?}");
        assert_eq!(u64::from(port.get() % STATIONS), mac.mac.to_u64() & 0xffff);
        *learned.entry(port).or_default() += u32::from(!is_static);
    });
    fdb.sweep_flushed();
    assert_eq!(fdb.len(), seen.len());
    for port in (0..2 * STATIONS).map(port) {
        assert_eq!(
            fdb.count(port),
            learned.get(&port).copied().unwrap_or(0),
            "{port:?}"
        );
    }
}

/// Whoever makes a full database look for room has it look at few buckets, and the next at others.
#[test]
fn a_search_for_room_is_bounded() {
    let fdb = Fdb::with_buckets(config(64), 64, 1024);
    for n in 0..64 {
        fdb.add_static(mac(n), port(1)).unwrap();
    }
    let hand = || fdb.shared.hand.load(Ordering::Relaxed);
    for searches in 0..5 {
        assert_eq!(hand(), 16 * searches);
        let writer = fdb.try_lock().unwrap();
        assert!(!writer.make_room(port(2), NOW));
    }
}
