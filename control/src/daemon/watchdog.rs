//! The service manager's watchdog (`WatchdogSec=` of the unit), fed only while every worker goes
//! on.

use std::io;
use std::thread;

use ringway_dataplane::Heartbeat;
use sd_notify::NotifyState;

/// Looks in one watchdog time: a worker that is held up for one of them once costs nothing.
const LOOKS: u32 = 4;

/// Starts the thread that feeds the watchdog, if the service manager asks for it. It ends with the
/// process.
///
/// # Errors
/// There can be no further thread.
pub(super) fn start(mut heartbeat: Heartbeat) -> io::Result<()> {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else {
        return Ok(());
    };
    let feed = move || {
        let mut lives = true;
        loop {
            let lived = std::mem::replace(&mut lives, heartbeat.beat());
            if lives {
                super::notify(&[NotifyState::Watchdog]);
            } else if lived {
                tracing::error!("a worker hangs; the watchdog is not fed");
            }
            thread::sleep(limit / LOOKS);
        }
    };
    thread::Builder::new()
        .name("ringway-watchdog".into())
        .spawn(feed)?;
    Ok(())
}
