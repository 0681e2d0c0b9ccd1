//! Loops: frames that come back through another port, between real interfaces of the host. Needs root
//! and iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

/// By this name tests that need root are left out without it.
mod as_root {
    use ringway_api::{OnLoop, PortConfig, PortDetail, PortState};
    use ringway_guest::Guest;
    use ringway_testbed::host::{fresh_namespace, ip};

    use crate::common::{Lab, eventually, frame, mac, name, receive, tap};

    fn tap_with(interface: &str, on_loop: OnLoop) -> PortConfig {
        let PortConfig::Tap(mut config) = tap(interface, 1, true) else {
            panic!("another kind");
        };
        config.on_loop = on_loop;
        PortConfig::Tap(config)
    }

    /// Two taps that the host connects by a bridge of its own, and two guests.
    struct Loop {
        lab: Lab,
        guests: [Guest; 2],
    }

    impl Loop {
        fn new(on_loop: OnLoop) -> Self {
            fresh_namespace();
            let lab = Lab::start();
            for tap in ["rw0", "rw1"] {
                lab.switch
                    .add_port(name(tap), tap_with(tap, on_loop))
                    .unwrap();
                ip(&format!("link set {tap} up"));
            }
            let guests = ["one", "two"].map(|port| lab.guest(port, Guest::builder()));
            Self { lab, guests }
        }

        /// Patches the taps together.
        fn close(&self) {
            ip("link add br0 type bridge");
            for tap in ["rw0", "rw1"] {
                ip(&format!("link set {tap} master br0"));
            }
            ip("link set br0 up");
        }

        fn open(&self) {
            ip("link set rw1 nomaster");
        }

        fn detail(&self, port: &str) -> PortDetail {
            self.lab.switch.port(&name(port)).unwrap()
        }

        /// A broadcast of the first guest, and what has come of others thrown away.
        fn broadcast(&mut self) {
            let mut hello = frame(0xff, 1, 64, 1);
            hello[..6].fill(0xff);
            self.guests[0].send_frame(&hello).unwrap();
            for guest in &mut self.guests {
                while guest.try_recv(0).unwrap().is_some() {}
            }
        }

        /// The taps that are blocked.
        fn blocked(&self) -> usize {
            let is_blocked = |tap: &&&str| {
                let detail = self.detail(tap);
                let error = detail.last_error.unwrap_or_default();
                detail.port.state == PortState::Impaired && error.starts_with("blocked for ")
            };
            ["rw0", "rw1"].iter().filter(is_blocked).count()
        }

        /// The guests have their network, whatever the taps do.
        fn assert_guests_work(&mut self) {
            let [one, two] = &mut self.guests;
            while two.try_recv(0).unwrap().is_some() {}
            one.send_frame(&frame(2, 1, 64, 77)).unwrap();
            loop {
                let received = receive(two).frame;
                if received[..6] == mac(2) {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_loop_is_told_and_passes_frames_all_the_same() {
        let mut circle = Loop::new(OnLoop::Alarm);
        circle.broadcast();
        circle.assert_guests_work();
        assert_eq!(circle.detail("rw0").last_error, None);
        circle.close();
        eventually("an alarm", || {
            circle.broadcast();
            ["rw0", "rw1"].iter().any(|tap| {
                let detail = circle.detail(tap);
                let error = detail.last_error.unwrap_or_default();
                detail.port.state == PortState::Up
                    && error.contains("a loop through another switch")
            })
        });
        circle.assert_guests_work();
    }

    #[test]
    fn a_port_that_is_to_be_blocked_in_a_loop_is_and_serves_again_without_it() {
        let mut circle = Loop::new(OnLoop::Block);
        circle.close();
        eventually("a tap is blocked", || {
            circle.broadcast();
            circle.blocked() > 0
        });
        let refused = |circle: &Loop| {
            ["rw0", "rw1"].map(|tap| circle.detail(tap).port.counters.fdb_moves_refused)
        };
        // With it the loop is open, and the storm over.
        circle.assert_guests_work();
        circle.open();
        eventually("both serve again", || {
            circle.broadcast();
            circle.blocked() == 0
        });
        let to_taps =
            |circle: &Loop| ["rw0", "rw1"].map(|tap| circle.detail(tap).port.counters.tx_frames);
        let let_both_get = |circle: &mut Loop, frames: u64| {
            let sent = to_taps(circle);
            eventually("both get frames", || {
                circle.broadcast();
                let now = to_taps(circle);
                now[0] >= sent[0] + frames && now[1] >= sent[1] + frames
            });
        };
        // What was left of it in the taps' queues comes first.
        eventually("the storm is over", || {
            let before = refused(&circle);
            let_both_get(&mut circle, 100);
            refused(&circle) == before
        });
    }
}
