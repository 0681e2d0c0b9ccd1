use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::vhost_user::message::ReplyBody;
use crate::vhost_user::test_device::{body64, memfd, open_memfds, send_with_fds, wire};

fn pair() -> (UnixStream, Connection) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (theirs, Connection::new(ours.into(), Closing::default()))
}

fn message(connection: &mut Connection) -> Message {
    match connection.receive() {
        Ok(Received::Message(message)) => message,
        other => panic!("{other:?}"),
    }
}

fn pending(connection: &mut Connection) {
    assert!(matches!(connection.receive(), Ok(Received::Pending)));
}

#[test]
fn messages_arrive_whole_however_they_are_cut() {
    let (mut peer, mut connection) = pair();
    let bytes = wire(2, true, &body64(&[0x1_4000_0000]));
    for cut in 1..bytes.len() {
        peer.write_all(&bytes[..cut]).unwrap();
        pending(&mut connection);
        pending(&mut connection);
        peer.write_all(&bytes[cut..]).unwrap();
        let message = message(&mut connection);
        assert!(message.need_reply);
        assert!(matches!(
            message.request,
            Ok(Request::SetFeatures(0x1_4000_0000))
        ));
    }
    peer.write_all(&[bytes.clone(), wire(1, false, &[]), bytes].concat())
        .unwrap();
    assert_eq!(message(&mut connection).id, 2);
    assert_eq!(message(&mut connection).id, 1);
    assert_eq!(message(&mut connection).id, 2);
    pending(&mut connection);
}

#[test]
fn fds_belong_to_the_message_that_they_came_with() {
    let (peer, mut connection) = pair();
    let kick = |index| wire(12, false, &body64(&[index]));
    let fds: Vec<_> = (0..3).map(|size| memfd("attached", size)).collect();
    // The message in between has none, and all lie in the socket at once.
    send_with_fds(&peer, &kick(0), &[fds[1].as_fd()]);
    send_with_fds(&peer, &wire(1, false, &[]), &[]);
    send_with_fds(&peer, &kick(1), &[fds[2].as_fd()]);
    let size = |message: Message| match message.request {
        Ok(Request::SetVringKick(kick)) => rustix::fs::fstat(kick.fd.unwrap()).unwrap().st_size,
        other => panic!("{other:?}"),
    };
    assert_eq!(size(message(&mut connection)), 1);
    assert!(matches!(
        message(&mut connection).request,
        Ok(Request::GetFeatures)
    ));
    assert_eq!(size(message(&mut connection)), 2);
}

#[test]
fn eight_fds_arrive_and_more_end_the_connection() {
    for count in [0, 1, 7, 8, 9, 10, 16] {
        let name = format!("many-{count}");
        let (peer, mut connection) = pair();
        let fds: Vec<_> = (0..count).map(|_| memfd(&name, 0)).collect();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_with_fds(&peer, &wire(99, false, &[]), &borrowed);
        drop(borrowed);
        drop(fds);
        let received = connection.receive();
        if count <= MAX_FDS {
            assert!(matches!(received, Ok(Received::Message(_))), "{count}");
        } else {
            assert!(
                matches!(received, Err(ConnectionError::TooManyFds)),
                "{count}"
            );
        }
        assert_eq!(open_memfds(&name), 0, "{count}");
    }
}

#[test]
fn fds_that_trickle_in_with_one_message_are_bounded() {
    let (peer, mut connection) = pair();
    let bytes = wire(5, false, &[0; 264]);
    let fd = memfd("trickle", 0);
    let mut result = Ok(Received::Pending);
    for byte in &bytes {
        send_with_fds(&peer, &[*byte], &[fd.as_fd()]);
        result = connection.receive();
        if result.is_err() {
            break;
        }
    }
    assert!(matches!(result, Err(ConnectionError::TooManyFds)));
    assert_eq!(open_memfds("trickle"), 1, "only the test's own");
}

#[test]
fn the_peers_end_is_told_from_half_a_message() {
    let (peer, mut connection) = pair();
    drop(peer);
    assert!(matches!(connection.receive(), Ok(Received::Closed)));
    for len in [1, 11, 12, 19] {
        let (mut peer, mut connection) = pair();
        peer.write_all(&wire(2, false, &[0; 8])[..len]).unwrap();
        drop(peer);
        let error = connection.receive().unwrap_err();
        assert!(
            matches!(error, ConnectionError::Truncated),
            "{len}: {error}"
        );
    }
}

#[test]
fn a_header_that_announces_too_much_ends_the_connection() {
    let (mut peer, mut connection) = pair();
    let mut bytes = wire(2, false, &[]);
    bytes[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    peer.write_all(&bytes).unwrap();
    let error = connection.receive().unwrap_err();
    assert!(matches!(
        error,
        ConnectionError::Codec(CodecError::TooLong { .. })
    ));
}

#[test]
fn replies_wait_for_room_and_arrive_in_order() {
    let (mut peer, mut connection) = pair();
    let reply = |value| Reply {
        request: 1,
        body: ReplyBody::U64(value),
    };
    let mut sent = 0_u64;
    while !connection.wants_write() {
        connection.send(&reply(sent)).unwrap();
        sent += 1;
    }
    peer.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    while connection.wants_write() {
        let mut chunk = [0; 4096];
        let count = peer.read(&mut chunk).unwrap();
        bytes.extend_from_slice(&chunk[..count]);
        connection.flush().unwrap();
    }
    let _ = peer.read_to_end(&mut bytes);
    let expected: Vec<u8> = (0..sent).flat_map(|value| reply(value).encode()).collect();
    assert!(bytes == expected);
}

#[test]
fn a_peer_that_reads_no_replies_loses_the_connection() {
    let (_peer, mut connection) = pair();
    let reply = Reply {
        request: 1,
        body: ReplyBody::U64(0),
    };
    let error = loop {
        if let Err(error) = connection.send(&reply) {
            break error;
        }
        assert!(connection.outgoing.len() <= MAX_WAITING_REPLIES * MAX_REPLY_LEN);
    };
    assert!(matches!(error, ConnectionError::RepliesUnread));
}

#[test]
fn a_reply_to_a_closed_peer_is_an_error() {
    let (peer, mut connection) = pair();
    drop(peer);
    let reply = Reply {
        request: 1,
        body: ReplyBody::U64(0),
    };
    let error = connection.send(&reply).unwrap_err();
    assert!(matches!(error, ConnectionError::Closed));
}
