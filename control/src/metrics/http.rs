//! The metrics over HTTP, for Prometheus to scrape: one thread, some connections at once, each for a
//! bounded time. It reads counters and nothing else.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE as CONTENT_TYPE_HEADER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, oneshot};

use crate::thread::OwnedThread;

/// Where metrics are served if no address is given: on this host only.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9479);

/// The text format's name in HTTP.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Connections at once; others wait in the backlog.
const MAX_CONNECTIONS: usize = 256;

/// How long a client may take to ask, also for the next time,
const HEADER_TIME: Duration = Duration::from_secs(10);
/// and for all that it asks in one connection.
const CONNECTION_TIME: Duration = Duration::from_secs(60);

/// How long nobody is let in when this process has no fds for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What makes the text.
type Source = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves metrics until it is dropped.
#[derive(Debug)]
pub struct Exporter {
    /// Where they are.
    address: SocketAddr,
    _thread: OwnedThread<oneshot::Sender<()>>,
}

impl Exporter {
    /// Serves what `source` tells, asked anew for each scrape, at an address.
    ///
    /// # Errors
    /// The address can't be had, or there can be no thread.
    pub fn start(
        listen: SocketAddr,
        source: impl Fn() -> String + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let run = move || {
            let served = runtime.block_on(async {
                tokio::select! {
                    served = serve(listener, Arc::new(source)) => served,
                    _ = stopped => Ok(()),
                }
            });
            if let Err(error) = served {
                tracing::error!(%error, "metrics are no longer served");
            }
        };
        Ok(Self {
            address,
            _thread: OwnedThread::start("ringway-metrics", stop, run)?,
        })
    }

    /// Where they are served: with the port that the kernel chose, if it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn serve(listener: TcpListener, source: Source) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return Ok(());
        };
        let Ok((stream, _)) = listener.accept().await else {
            // The peer is gone already, or there are no fds.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let source = Arc::clone(&source);
        tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let answer = answer(&request, &source);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIME)
                .serve_connection(TokioIo::new(stream), answer);
            // Who asks badly or leaves is answered or left by then.
            let _ = tokio::time::timeout(CONNECTION_TIME, connection).await;
            drop(place);
        });
    }
}

const PAGE: &str = "<!doctype html><html lang=\"en\"><title>ringwayd</title>\
    <p>ringwayd: <a href=\"/metrics\">metrics</a> for Prometheus</p></html>\n";

fn answer(request: &Request<Incoming>, source: &Source) -> Response<Full<Bytes>> {
    let plain = "text/plain; charset=utf-8";
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, CONTENT_TYPE, source()),
        (&Method::GET | &Method::HEAD, "/") => {
            (StatusCode::OK, "text/html; charset=utf-8", PAGE.to_owned())
        }
        (&Method::GET | &Method::HEAD, _) => {
            let text = "there is /metrics and nothing else\n";
            (StatusCode::NOT_FOUND, plain, text.to_owned())
        }
        _ => {
            let text = "metrics are read only: GET\n";
            (StatusCode::METHOD_NOT_ALLOWED, plain, text.to_owned())
        }
    };
    let response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE_HEADER, kind)
        .header(ALLOW, "GET, HEAD");
    let body = Full::new(Bytes::from(text));
    // All of these are valid.
    response.body(body).unwrap_or_default()
}
