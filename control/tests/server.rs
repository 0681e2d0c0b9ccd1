//! The control server over real sockets, with clients that misbehave.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringway_control::api::{ApiError, DaemonInfo, ErrorKind, NoParams, SocketAccess};
use ringway_control::rpc::{
    Client, ControlSocket, KEPT_CONNECTIONS, MAX_CONNECTIONS, MAX_LINE, Reply, Server, Stream,
    Terms,
};
use serde_json::Value;
use serde_json::value::RawValue;

struct Running {
    server: Server,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

/// A server whose `echo` gives back the parameters and whose `big` gives 4 MiB.
fn start() -> Running {
    start_with(|method, params| match method {
        "echo" => Ok(params.map_or(RawValue::NULL.to_owned(), ToOwned::to_owned)),
        "big" => Ok(RawValue::from_string(format!("\"{}\"", "x".repeat(4 << 20))).unwrap()),
        _ => Err(ApiError::new(
            ErrorKind::MethodNotFound,
            "no such method",
            "echo",
        )),
    })
}

fn start_with(
    handler: impl Fn(&str, Option<&RawValue>) -> Result<Box<RawValue>, ApiError> + Send + Sync + 'static,
) -> Running {
    start_on(Terms::default(), handler)
}

fn start_on(
    terms: Terms,
    handler: impl Fn(&str, Option<&RawValue>) -> Result<Box<RawValue>, ApiError> + Send + Sync + 'static,
) -> Running {
    let replies =
        move |method: &str, params: Option<&_>| handler(method, params).map(Reply::Result);
    start_replying(terms, replies)
}

fn start_replying(
    terms: Terms,
    handler: impl Fn(&str, Option<&RawValue>) -> Result<Reply, ApiError> + Send + Sync + 'static,
) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let socket = ControlSocket::bind(&path, &SocketAccess::default()).unwrap();
    Running {
        server: Server::start_on(socket, Arc::new(handler), terms).unwrap(),
        path,
        _directory: directory,
    }
}

/// A server that answers each request with a stream of as many lines as its client takes, behind an
/// empty line if it is "silent".
fn streaming() -> Running {
    start_replying(Terms::default(), |method, _| {
        let (bell, far) = UnixStream::pair().unwrap();
        let is_silent = method == "silent";
        let stream = Stream::new(bell.into(), move |out| {
            // Held: nobody rings.
            let _ = &far;
            if !is_silent {
                out.extend_from_slice(b"{\"line\":1}\n");
            }
            true
        });
        Ok(Reply::Stream(stream))
    })
}

impl Running {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        // No answer within this is a failed test, not a hanging one.
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    fn must_serve(&self) {
        let mut stream = self.connect();
        stream.write_all(REQUEST).unwrap();
        assert_eq!(answer(&stream)["result"], 7);
    }
}

const REQUEST: &[u8] = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"seven\"}\n";

fn seven() -> Running {
    seven_on(Terms::default())
}

fn seven_on(terms: Terms) -> Running {
    start_on(terms, |_, _| Ok(RawValue::from_string("7".into()).unwrap()))
}

/// Terms on which no user is an operator.
fn without_operators() -> Terms {
    Terms {
        is_operator: |_| false,
        ..Terms::default()
    }
}

/// Terms on which nobody may be idle for long.
fn impatient() -> Terms {
    Terms {
        idle_timeout: Duration::from_millis(50),
        ..Terms::default()
    }
}

fn answer(stream: &UnixStream) -> Value {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

#[test]
fn requests_in_one_write_and_in_many_are_answered_in_order() {
    let running = start();
    let mut stream = running.connect();
    let request = |id: u32| {
        format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"echo\",\"params\":{{}}}}\n")
    };
    let text: String = (0..10).map(request).collect();
    let (now, later) = text.as_bytes().split_at(77);
    stream.write_all(now).unwrap();
    for byte in later {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut lines = BufReader::new(&stream).lines();
    for id in 0..10 {
        let value: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(value["id"], id);
    }
}

#[test]
fn a_line_of_10_mib_is_refused_and_ends_its_connection_only() {
    let running = seven();
    let mut bystander = running.connect();
    let mut stream = running.connect();
    // The server hangs up before it has read all.
    let _ = stream.write_all(&vec![b'x'; 10 << 20]);
    let error = answer(&stream);
    assert_eq!(error["error"]["data"]["kind"], "line_too_long");
    assert_eq!(error["id"], Value::Null);
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    bystander.write_all(REQUEST).unwrap();
    assert_eq!(answer(&bystander)["result"], 7);
}

#[test]
fn a_line_of_exactly_the_limit_is_served() {
    let running = start();
    let mut stream = running.connect();
    let head = r#"{"jsonrpc":"2.0","id":1,"method":"echo","params":{"a":""#;
    let tail = "\"}}\n";
    let fill = "x".repeat(MAX_LINE - head.len() - (tail.len() - 1));
    stream
        .write_all(format!("{head}{fill}{tail}").as_bytes())
        .unwrap();
    assert_eq!(answer(&stream)["result"]["a"], fill);
}

#[test]
fn lines_that_are_no_request_get_an_error_and_the_connection_lives() {
    let running = seven();
    let mut stream = running.connect();
    let deep = format!("{}{}\n", "[".repeat(300_000), "]".repeat(300_000));
    let cases: [(&[u8], i64); 5] = [
        (b"\xff\xfe{}\n", -32700),
        (b"{\"jsonrpc\":\n", -32700),
        (b"\n", -32700),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"id\":2,\"method\":\"a\"}\n",
            -32600,
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"a\",\"x\":1}\n",
            -32600,
        ),
    ];
    for (line, code) in cases {
        stream.write_all(line).unwrap();
        assert_eq!(answer(&stream)["error"]["code"], code, "{line:?}");
    }
    stream.write_all(deep.as_bytes()).unwrap();
    assert_eq!(answer(&stream)[0]["error"]["code"], -32600);
    stream.write_all(REQUEST).unwrap();
    assert_eq!(answer(&stream)["result"], 7);
}

#[test]
fn a_thousand_connections_are_bounded_and_leave_no_trace() {
    const PLACES: usize = MAX_CONNECTIONS - KEPT_CONNECTIONS;
    let running = seven_on(without_operators());
    let mut streams: Vec<_> = (0..1000).map(|_| running.connect()).collect();
    // Who is over the limit is told so; who is within it is served.
    let (mut served, mut refused) = (0, 0);
    for stream in &mut streams {
        let _ = stream.write_all(REQUEST);
        let answer = answer(stream);
        if answer["result"] == 7 {
            served += 1;
        } else {
            assert_eq!(answer["error"]["data"]["kind"], "too_many_connections");
            let hint = answer["error"]["data"]["hint"].as_str().unwrap();
            assert!(hint.contains("as root"), "{hint}");
            refused += 1;
        }
    }
    assert_eq!((served, refused), (PLACES, 1000 - PLACES));
    assert_eq!(running.server.connections(), PLACES);
    drop(streams);
    running.server.wait_until_idle();
    running.must_serve();
}

/// All places are taken by clients that say nothing, half a line, or nothing more: of root, too.
#[test]
fn an_operator_is_served_however_many_connections_idle() {
    let running = seven();
    let mut idle: Vec<_> = (0..MAX_CONNECTIONS).map(|_| running.connect()).collect();
    for (at, stream) in idle.iter_mut().enumerate() {
        match at % 3 {
            0 => {}
            1 => stream.write_all(&REQUEST[..20]).unwrap(),
            _ => {
                stream.write_all(REQUEST).unwrap();
                assert_eq!(answer(stream)["result"], 7);
            }
        }
    }
    for _ in 0..3 {
        running.must_serve();
    }
    // The first one was idle for longest.
    assert_eq!(answer(&idle[0])["error"]["data"]["kind"], "idle");
    assert!(matches!(idle[0].read(&mut [0; 1]), Ok(0) | Err(_)));
}

#[test]
fn nobodys_request_is_cut_off_for_an_operator() {
    let (entered, has_entered) = mpsc::channel();
    let (leave, may_leave) = mpsc::channel::<()>();
    let may_leave = Mutex::new(may_leave);
    let running = start_with(move |method, _| {
        if method == "seven" {
            entered.send(()).unwrap();
            may_leave.lock().unwrap().recv().unwrap();
        }
        Ok(RawValue::from_string("7".into()).unwrap())
    });
    let mut busy: Vec<_> = (0..MAX_CONNECTIONS).map(|_| running.connect()).collect();
    for stream in &mut busy {
        stream.write_all(REQUEST).unwrap();
        has_entered.recv().unwrap();
    }
    let refused = answer(&running.connect());
    assert_eq!(refused["error"]["data"]["kind"], "too_many_connections");
    // In any order.
    busy.iter().for_each(|_| leave.send(()).unwrap());
    for stream in &busy {
        assert_eq!(answer(stream)["result"], 7);
    }
}

#[test]
fn who_has_sent_nothing_or_half_a_line_for_too_long_is_told_so_and_dropped() {
    let running = seven_on(impatient());
    let (mut silent, mut half) = (running.connect(), running.connect());
    half.write_all(&REQUEST[..20]).unwrap();
    for stream in [&mut silent, &mut half] {
        let error = answer(stream);
        assert_eq!(error["error"]["data"]["kind"], "idle");
        assert_eq!(error["id"], Value::Null);
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
    running.server.wait_until_idle();
}

#[test]
fn single_bytes_put_no_end_off() {
    let running = seven_on(impatient());
    let mut stream = running.connect();
    // The line never ends, and a byte comes whenever the last one was taken.
    while stream.write_all(b" ").is_ok() {
        std::thread::yield_now();
    }
    let error = answer(&stream);
    assert_eq!(error["error"]["data"]["kind"], "idle");
}

#[test]
fn a_request_that_runs_for_longer_than_clients_may_idle_is_answered() {
    let terms = impatient();
    let running = start_on(terms, move |_, _| {
        std::thread::sleep(4 * terms.idle_timeout);
        Ok(RawValue::from_string("7".into()).unwrap())
    });
    let mut stream = running.connect();
    stream.write_all(REQUEST).unwrap();
    assert_eq!(answer(&stream)["result"], 7);
}

/// `ringway measure` asks at intervals that may be long.
#[test]
fn the_client_connects_again_when_it_was_dropped_for_idling() {
    let report = r#"{"version":"1","pid":1,"uptime_seconds":1.0}"#;
    let running = start_on(impatient(), move |_, _| {
        Ok(RawValue::from_string(report.into()).unwrap())
    });
    let mut client = Client::connect(&running.path, Duration::from_secs(30)).unwrap();
    for _ in 0..3 {
        assert_eq!(client.call::<DaemonInfo>(&NoParams {}).unwrap().pid, 1);
        running.server.wait_until_idle();
    }
}

#[test]
fn a_slow_reader_delays_nobody_else() {
    let running = start();
    let mut slow = running.connect();
    let request = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"big\"}\n";
    slow.write_all(request).unwrap();
    // Its first byte shows that the server is writing to it, and 4 MiB fill any socket buffer.
    slow.read_exact(&mut [0; 1]).unwrap();
    let mut other = running.connect();
    other
        .write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"none\"}\n")
        .unwrap();
    assert_eq!(answer(&other)["error"]["code"], -32601);
}

#[test]
fn a_slow_reader_is_dropped_at_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let socket = ControlSocket::bind(&path, &SocketAccess::default()).unwrap();
    let big: Box<RawValue> = RawValue::from_string(format!("\"{}\"", "x".repeat(4 << 20))).unwrap();
    let handler = move |_: &str, _: Option<&RawValue>| Ok(Reply::Result(big.clone()));
    let terms = Terms {
        write_timeout: Duration::from_millis(100),
        ..Terms::default()
    };
    let server = Server::start_on(socket, Arc::new(handler), terms).unwrap();
    let mut slow = UnixStream::connect(&path).unwrap();
    slow.write_all(REQUEST).unwrap();
    slow.read_exact(&mut [0; 1]).unwrap();
    server.wait_until_idle();
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 4 << 20, "{} bytes", rest.len());
}

#[test]
fn shutdown_answers_what_runs_and_closes_what_idles() {
    let (entered, has_entered) = mpsc::channel();
    let (leave, may_leave) = mpsc::channel::<()>();
    let may_leave = Mutex::new(may_leave);
    let running = start_with(move |_, _| {
        entered.send(()).unwrap();
        may_leave.lock().unwrap().recv().unwrap();
        Ok(RawValue::from_string("7".into()).unwrap())
    });
    let mut idle = running.connect();
    let mut busy = running.connect();
    busy.write_all(REQUEST).unwrap();
    has_entered.recv().unwrap();
    let path = running.path.clone();
    let ending = std::thread::spawn(move || running.server.shutdown());
    // The idle connection's end shows that the shutdown is on its way.
    assert_eq!(idle.read(&mut [0; 1]).unwrap(), 0);
    leave.send(()).unwrap();
    assert_eq!(answer(&busy)["result"], 7);
    ending.join().unwrap();
    assert!(!path.exists());
}

#[test]
fn a_client_that_vanishes_amid_a_request_is_forgotten() {
    let running = seven();
    for _ in 0..200 {
        let mut stream = running.connect();
        stream.write_all(&REQUEST[..20]).unwrap();
    }
    running.server.wait_until_idle();
    running.must_serve();
}

fn begin(running: &Running, method: &str) -> UnixStream {
    let mut stream = running.connect();
    let request = format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"{method}\"}}\n");
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

#[test]
fn who_sends_something_on_a_stream_is_told_and_closed() {
    let running = streaming();
    let mut stream = begin(&running, "silent");
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut next = || lines.next().map(Result::unwrap);
    assert_eq!(next().unwrap(), r#"{"jsonrpc":"2.0","id":1,"result":{}}"#);
    stream.write_all(REQUEST).unwrap();
    let error: Value = serde_json::from_str(&next().unwrap()).unwrap();
    assert_eq!(error["error"]["data"]["kind"], "invalid_request");
    // What it sent is not read to the end, which a socket tells as a reset.
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    running.server.wait_until_idle();
}

#[test]
fn streams_end_when_their_clients_go_and_when_the_server_does() {
    let running = streaming();
    // Some wait for a line, others have more of them than they take.
    drop([begin(&running, "silent"), begin(&running, "loud")]);
    running.server.wait_until_idle();
    let mut stay = [begin(&running, "silent"), begin(&running, "loud")];
    for stream in &mut stay {
        assert_eq!(answer(stream)["result"], serde_json::json!({}));
    }
    running.server.shutdown();
    for mut stream in stay {
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
    }
}

#[test]
fn an_operator_has_the_place_of_a_stream_that_nobody_reads() {
    let running = streaming();
    let asleep: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let mut stream = begin(&running, "loud");
            stream.read_exact(&mut [0; 1]).unwrap();
            stream
        })
        .collect();
    assert_eq!(
        answer(&begin(&running, "silent"))["result"],
        serde_json::json!({})
    );
    drop(asleep);
}
