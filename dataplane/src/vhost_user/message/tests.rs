use proptest::prelude::*;

use super::*;
use crate::vhost_user::test_device::{body32, body64, memfd, open_memfds, wire};

fn parse(request: u32, body: &[u8], fds: usize) -> Result<Request, CodecError> {
    parse_with("codec", request, body, fds)
}

fn parse_with(name: &str, request: u32, body: &[u8], fds: usize) -> Result<Request, CodecError> {
    let bytes = wire(request, false, body);
    let header = Header::parse(bytes.first_chunk().unwrap())?;
    let fds = (0..fds).map(|_| memfd(name, 0)).collect();
    Request::parse(header, &bytes[HEADER_LEN..], fds)
}

/// Body length and number of fds that each known request takes, and its name.
const SHAPES: &[(u32, usize, usize, &str)] = &[
    (1, 0, 0, "GetFeatures"),
    (2, 8, 0, "SetFeatures"),
    (3, 0, 0, "SetOwner"),
    (4, 0, 0, "ResetOwner"),
    (6, 8, 0, "SetLogBase"),
    (7, 0, 1, "SetLogFd"),
    (8, 8, 0, "SetVringNum"),
    (9, 40, 0, "SetVringAddr"),
    (10, 8, 0, "SetVringBase"),
    (11, 8, 0, "GetVringBase"),
    (12, 8, 1, "SetVringKick"),
    (13, 8, 1, "SetVringCall"),
    (14, 8, 1, "SetVringErr"),
    (15, 0, 0, "GetProtocolFeatures"),
    (16, 8, 0, "SetProtocolFeatures"),
    (17, 0, 0, "GetQueueNum"),
    (18, 8, 0, "SetVringEnable"),
    (19, 8, 0, "SendRarp"),
    (20, 8, 0, "NetSetMtu"),
    (21, 0, 1, "SetBackendReqFd"),
    (24, 12, 0, "GetConfig"),
    (25, 12, 0, "SetConfig"),
    (34, 0, 0, "ResetDevice"),
    (36, 0, 0, "GetMaxMemSlots"),
    (37, 40, 1, "AddMemReg"),
    (38, 40, 0, "RemMemReg"),
    (39, 8, 0, "SetStatus"),
    (40, 0, 0, "GetStatus"),
];

#[test]
fn each_request_takes_exactly_its_body_and_its_fds() {
    for &(request, len, fds, name) in SHAPES {
        let parsed = parse(request, &vec![0; len], fds).unwrap();
        let debug = format!("{parsed:?}");
        let end = debug.find(|c: char| !c.is_alphanumeric());
        assert_eq!(&debug[..end.unwrap_or(debug.len())], name, "{request}");
        for wrong in [len + 1, len.wrapping_sub(1), len + 8, 4096] {
            if wrong <= MAX_BODY && !(request == 6 && wrong == 16) {
                let error = parse(request, &vec![0; wrong], fds).unwrap_err();
                assert!(
                    matches!(error, CodecError::BodySize { .. }),
                    "{request}: {error}"
                );
            }
        }
        for wrong in (0..=MAX_FDS).filter(|count| *count != fds) {
            // REM_MEM_REG may carry one fd, which is closed unread.
            if request == 38 && wrong == 1 {
                assert!(parse(request, &vec![0; len], wrong).is_ok());
                continue;
            }
            let error = parse(request, &vec![0; len], wrong).unwrap_err();
            assert!(
                matches!(error, CodecError::FdCount { .. }),
                "{request}: {error}"
            );
        }
    }
}

#[test]
fn fds_that_a_request_does_not_keep_are_closed() {
    for request in (0..50).chain([0xff, u32::MAX]) {
        for body in [0, 8, 16, 40, 264] {
            drop(parse_with("codec-leak", request, &vec![0; body], MAX_FDS));
        }
    }
    assert_eq!(open_memfds("codec-leak"), 0);
}

#[test]
fn a_memory_table_has_as_many_regions_and_fds_as_it_says() {
    let table = |count: u32, regions: usize| {
        let mut body = body32(&[count, 0]);
        for region in 0..regions as u64 {
            body.extend(body64(&[region, 1, 2, 3]));
        }
        body
    };
    for count in 0..=8 {
        let Ok(Request::SetMemTable(regions)) =
            parse(5, &table(count, count as usize), count as usize)
        else {
            panic!("a table of {count} regions is right");
        };
        let addrs: Vec<_> = regions.iter().map(|(spec, _)| spec.guest_addr).collect();
        assert_eq!(addrs, (0..u64::from(count)).collect::<Vec<_>>());
    }
    // Room for more than it counts, as user-mode Linux sends it, takes no more files.
    for (count, places) in [(0, 1), (1, 2), (2, 3), (7, 8)] {
        let Ok(Request::SetMemTable(regions)) = parse(5, &table(count, places), count as usize)
        else {
            panic!("a table of {count} regions in {places} places is right");
        };
        assert_eq!(regions.len(), count as usize);
        assert!(parse(5, &table(count, places), places).is_err());
    }
    assert!(parse(5, &table(1, 9), 1).is_err());
    assert!(parse(5, &table(3, 2), 3).is_err());
    assert!(parse(5, &table(2, 2), 1).is_err());
    assert!(parse(5, &table(2, 2), 3).is_err());
    assert!(parse(5, &table(9, 9), 8).is_err());
    assert!(parse(5, &table(u32::MAX, 0), 0).is_err());
    assert!(parse(5, &[0; 7], 0).is_err());
    let mut odd = table(1, 1);
    odd.push(0);
    assert!(parse(5, &odd, 1).is_err());
}

#[test]
fn a_regions_file_stays_with_its_region() {
    let bytes = wire(5, false, &[body32(&[2, 0]), body64(&[0; 8])].concat());
    let header = Header::parse(bytes.first_chunk().unwrap()).unwrap();
    let fds = vec![memfd("first", 1), memfd("second", 2)];
    let Ok(Request::SetMemTable(regions)) = Request::parse(header, &bytes[HEADER_LEN..], fds)
    else {
        panic!("it is a table");
    };
    let sizes: Vec<_> = regions
        .iter()
        .map(|(_, file)| rustix::fs::fstat(file).unwrap().st_size)
        .collect();
    assert_eq!(sizes, [1, 2]);
}

#[test]
fn vring_fds_have_an_index_of_eight_bits_and_a_flag() {
    for request in [12, 13, 14] {
        for index in [0, 1, 255] {
            assert!(parse(request, &body64(&[index]), 1).is_ok());
            assert!(parse(request, &body64(&[index]), 0).is_err());
            assert!(parse(request, &body64(&[index | 0x100]), 0).is_ok());
            assert!(parse(request, &body64(&[index | 0x100]), 1).is_err());
        }
        for value in [0x200, 0x1_0000, 0x1_0000_0000, u64::MAX] {
            assert!(parse(request, &body64(&[value]), 1).is_err(), "{value:#x}");
        }
    }
}

#[test]
fn ring_addresses_are_read_in_the_order_of_the_wire() {
    let body = [body32(&[3, 1]), body64(&[0x10, 0x20, 0x30, 0x40])].concat();
    let Ok(Request::SetVringAddr { index, addresses }) = parse(9, &body, 0) else {
        panic!("it is SET_VRING_ADDR");
    };
    assert_eq!(index, 3);
    assert_eq!(
        (addresses.desc, addresses.used, addresses.avail),
        (0x10, 0x20, 0x30)
    );
}

#[test]
fn values_out_of_range_are_refused() {
    assert!(parse(18, &body32(&[0, 2]), 0).is_err());
    assert!(parse(39, &body64(&[0x100]), 0).is_err());
    assert!(matches!(
        parse(18, &body32(&[7, 1]), 0),
        Ok(Request::SetVringEnable {
            index: 7,
            enable: true
        })
    ));
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    let Ok(Request::SendRarp(parsed)) = parse(19, &[mac.as_slice(), &[0xff; 2]].concat(), 0) else {
        panic!("it is SEND_RARP");
    };
    assert_eq!(parsed, MacAddr(mac));
}

#[test]
fn headers_of_other_versions_replies_and_long_bodies_are_refused() {
    let header = |request: u32, flags: u32, size: u32| {
        let bytes = body32(&[request, flags, size]);
        Header::parse(bytes.first_chunk().unwrap())
    };
    assert!(header(1, 0, 0).is_err());
    assert!(header(1, 2, 0).is_err());
    assert!(header(1, 3, 0).is_err());
    assert!(header(1, 0b101, 0).is_err());
    assert!(header(1, 1, 4097).is_err());
    assert!(header(1, 1, u32::MAX).is_err());
    assert!(!header(1, 1, 4096).unwrap().need_reply);
    assert!(header(1, 0b1001, 0).unwrap().need_reply);
}

#[test]
fn replies_have_every_byte_written() {
    let reply = Reply {
        request: 11,
        body: ReplyBody::VringState {
            index: 2,
            num: 0x8001_0005,
        },
    };
    assert_eq!(
        reply.encode().as_slice(),
        body32(&[11, 0b101, 8, 2, 0x8001_0005])
    );
    let reply = Reply {
        request: 1,
        body: ReplyBody::U64(0x1122_3344_5566_7788),
    };
    let expected = [body32(&[1, 0b101, 8]), body64(&[0x1122_3344_5566_7788])].concat();
    assert_eq!(reply.encode().as_slice(), expected);
}

/// "Virtio device config space" of vhost-user.rst; its fields are those of virtio 1.3, 5.1.4.
#[test]
fn a_piece_of_the_configuration_space_is_where_it_was_asked_for() {
    let ask = |offset: u32, size: u32, room: usize| {
        let head = body32(&[offset, size, 0]);
        parse(24, &[head, vec![0xaa; room]].concat(), 0)
    };
    assert!(matches!(
        ask(6, 4, 4),
        Ok(Request::GetConfig { offset: 6, size: 4 })
    ));
    assert!(ask(0, 256, 256).is_ok());
    for (offset, size, room) in [(0, 4, 3), (1, 256, 256), (u32::MAX, 1, 1), (0, u32::MAX, 0)] {
        assert!(ask(offset, size, room).is_err(), "{offset} {size}");
    }
    let space = NetConfig {
        max_queue_pairs: 3,
        mtu: 9000,
    };
    let encoded = |offset, size| {
        let body = ReplyBody::Config {
            offset,
            size,
            space,
        };
        Reply { request: 24, body }.encode()
    };
    let whole = encoded(0, 12);
    assert_eq!(whole[..24], body32(&[24, 0b101, 24, 0, 12, 0]));
    let [status, pairs, mtu] = [1, 3, 9000].map(u16::to_le_bytes);
    assert_eq!(whole[24..], [&[0; 6][..], &status, &pairs, &mtu].concat());
    assert_eq!(encoded(10, 2)[24..], mtu);
    assert_eq!(encoded(200, 56)[24..], [0; 56]);
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(
        bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN..400),
        small_request in proptest::option::of(0_u32..50),
        exact_len in any::<bool>(),
    ) {
        let mut bytes = bytes;
        if let Some(request) = small_request {
            bytes[0..4].copy_from_slice(&request.to_ne_bytes());
            bytes[4..8].copy_from_slice(&1_u32.to_ne_bytes());
        }
        if exact_len {
            let len = u32::try_from(bytes.len() - HEADER_LEN).unwrap();
            bytes[8..12].copy_from_slice(&len.to_ne_bytes());
        }
        if let Ok(header) = Header::parse(bytes.first_chunk().unwrap()) {
            let body = &bytes[HEADER_LEN..];
            let _ = Request::parse(header, body, Vec::new());
        }
    }
}
