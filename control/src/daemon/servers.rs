//! What runs beside the switch: the control socket, metrics over HTTP, and the directory whose sockets
//! are ports.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ringway_dataplane::SocketFile;

use super::{Failure, Service};
use crate::auto::{Profiles, Watcher};
use crate::metrics::Exporter;
use crate::rpc::{ControlSocket, Server};

/// What is configured of it.
pub(super) struct Beside {
    pub(super) metrics: Option<SocketAddr>,
    pub(super) auto: Option<PathBuf>,
    pub(super) profiles: Profiles,
}

/// All of it. Ends in the order of the fields, before the switch.
pub(super) struct Servers {
    watcher: Option<Watcher>,
    exporter: Option<Exporter>,
    control: Option<Server>,
}

impl Servers {
    pub(super) fn start(
        socket: ControlSocket,
        beside: Beside,
        service: &Arc<Service>,
    ) -> Result<Self, Failure> {
        let mut servers = Self {
            watcher: None,
            exporter: None,
            control: Some(serve_control(socket, service)?),
        };
        servers.exporter = match beside.metrics {
            Some(listen) => Some(serve_metrics(listen, service)?),
            None => None,
        };
        servers.watcher = match &beside.auto {
            Some(directory) => Some(watch(directory, beside.profiles, service)?),
            None => None,
        };
        Ok(servers)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.watcher = None;
        self.exporter = None;
        if let Some(control) = self.control.take() {
            control.shutdown();
        }
    }
}

fn serve_control(socket: ControlSocket, service: &Arc<Service>) -> Result<Server, Failure> {
    let service = Arc::clone(service);
    let handler = Arc::new(move |method: &str, params: Option<&_>| service.handle(method, params));
    Server::start(socket, handler).map_err(|error| Failure {
        what: format!("can't serve the control socket: {error}"),
        hint: "see `ulimit -u` and `ulimit -n`".into(),
    })
}

fn serve_metrics(listen: SocketAddr, service: &Arc<Service>) -> Result<Exporter, Failure> {
    let service = Arc::clone(service);
    let exporter = Exporter::start(listen, move || service.metrics());
    let exporter = exporter.map_err(|error| Failure {
        what: format!("can't serve metrics at {listen}: {error}"),
        hint: "give another address with --metrics=ADDRESS:PORT; `ss -ltnp` tells who has this one"
            .into(),
    })?;
    tracing::info!(address = %exporter.address(), "metrics are served");
    Ok(exporter)
}

/// Makes the directory, for those who may open the sockets of ports, if there is none.
fn watch(directory: &Path, profiles: Profiles, service: &Arc<Service>) -> Result<Watcher, Failure> {
    let file = SocketFile::of(service.socket_access());
    let made = file.and_then(|file| file.make_directory(directory));
    made.map_err(|bad| Failure {
        what: format!("--auto: {}", bad.reason),
        hint: bad.hint,
    })?;
    let watcher = Watcher::start(directory, profiles, Arc::clone(service));
    let watcher = watcher.map_err(|error| Failure {
        what: format!("--auto: {} can't be watched: {error}", directory.display()),
        hint: "see /proc/sys/fs/inotify/max_user_instances and `ulimit -n`".into(),
    })?;
    tracing::info!(directory = %directory.display(), "sockets here become ports");
    Ok(watcher)
}
