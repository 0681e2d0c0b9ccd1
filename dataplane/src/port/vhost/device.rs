//! What a session does to a port: rings that start, stop and move, each under its lock.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use ringway_api::Occurrence;
use ringway_bridge::MacAddr;
use rustix::io::Errno;
use tracing::{info, warn};

use super::{Scope, StartedRing, VhostPort};
use crate::burst_lock::lock;
use crate::call::{Call, Verdict};
use crate::memory::GuestMemory;
use crate::ring::Ring;
use crate::vhost_user::{Device, RingError, RingStart, is_eventfd};
use crate::wire::rarp::rarp;
use crate::wire::{Features, Offloads, ProtocolFeatures};

impl Device for VhostPort {
    fn queue_pairs(&self) -> u16 {
        self.pairs()
    }

    fn features(&self) -> Features {
        self.offered
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu()
    }

    fn refused(&self, ring: Option<u16>, reason: String) {
        let why = reason.clone();
        let scope = ring.map_or(Scope::Session, Scope::Ring);
        self.set_last_error(scope, reason, true);
        self.base
            .tell(|port| Occurrence::PortError { port, reason: why });
    }

    fn barred(&self, reason: String) {
        // It is tried again and again, and told once.
        if self.last_error().as_ref() == Some(&reason) {
            return;
        }
        let why = reason.clone();
        self.set_last_error(Scope::Entry, reason, true);
        self.base
            .tell(|port| Occurrence::PortError { port, reason: why });
    }

    fn unreachable(&self, path: &Path, error: Errno) {
        self.note_unreachable(path, error, Instant::now());
    }

    fn connected(&self) {
        lock(&self.unreachable).take();
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.forget_error_of(Scope::Entry);
        self.callee.begin(Instant::now());
        self.base
            .tell(|port| Occurrence::FrontEndConnected { port });
    }

    fn set_alarm(&self, alarm: Arc<OwnedFd>) {
        self.callee.set_alarm(alarm);
    }

    fn take_verdict(&self) -> Option<Verdict> {
        self.callee.take_verdict()
    }

    fn disconnected(&self, reason: Option<String>) {
        self.frontend_mtu.store(0, Ordering::Relaxed);
        self.set_features(Features::empty(), ProtocolFeatures::empty());
        let why = reason.clone();
        self.base
            .tell(|port| Occurrence::FrontEndDisconnected { port, reason: why });
        match reason {
            Some(reason) => self.set_last_error(Scope::Session, reason, true),
            // A front-end that goes since it was refused goes without a word.
            None => self.forget_errors_before(self.connections()),
        }
    }

    fn set_features(&self, features: Features, protocol_features: ProtocolFeatures) {
        let before = self.features();
        self.features.store(features.bits(), Ordering::Relaxed);
        self.protocol_features
            .store(protocol_features.bits(), Ordering::Relaxed);
        if before != (features, protocol_features) && !features.is_empty() {
            let owned = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
            self.base.tell(|port| Occurrence::FeaturesNegotiated {
                port,
                features: owned(features.names()),
                protocol_features: owned(protocol_features.names()),
            });
        }
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) -> Vec<(u16, RingError)> {
        *lock(&self.memory) = Arc::clone(&memory);
        let mut refused = Vec::new();
        for (index, queue) in (0..).zip(&self.queues) {
            let mut state = queue.lock();
            if let Some(started) = &mut state.started
                && let Err(error) = started.ring.relocate(started.addresses, &memory)
            {
                state.stopped_at = self.take_started(queue, index, &mut state);
                refused.push((index, error.into()));
            }
        }
        refused
    }

    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), RingError> {
        let (base, features, enabled) = (start.base, start.features, start.enabled);
        let (size, addresses) = (start.placed.size(), start.placed.addresses());
        if let Some(kick) = &start.kick {
            check_eventfd("kick", kick)?;
        }
        if let Some(call) = &start.call {
            prepare_call(call)?;
        }
        let mut ring = Ring::new(start.placed, base, features).ok_or(RingError::Base { base })?;
        ring.disarm();
        // Asked after the first access: a break from here on is found by the workers.
        if ring.is_broken() {
            return Err(RingError::Broken);
        }
        let offloads = if index % 2 == 1 {
            Offloads::from_guest(features)
        } else {
            Offloads::to_guest(features)
        };
        let (layout, base, resumed) = (ring.layout(), ring.base(), ring.resumed());
        let started = StartedRing {
            ring,
            enabled,
            offloads,
            addresses,
            kick: start.kick,
            call: start.call.map(|fd| self.call_to(fd)),
        };
        let queue = self.queue(index);
        let mut state = queue.lock();
        debug_assert!(state.started.is_none() && state.stopped_at.is_none());
        let binding = state.binding.clone();
        if index % 2 == 1 {
            let frames = queue.counters.frames.get();
            self.kicks[usize::from(index / 2)].begin(frames);
        }
        if let (Some(kick), Some(binding)) = (&started.kick, &binding) {
            let watched = self.watch_kick(index / 2, binding, kick);
            watched.map_err(|source| fd_error("kick", source))?;
        }
        state.started = Some(started);
        self.show(queue, index, &state);
        drop(state);
        self.forget_error_of(Scope::Ring(index));
        self.tell_whole_state();
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            let port = &self.base.name;
            info!(%port, ring = index, size, ?layout, base, enabled, suppressed, "ring started");
            if resumed {
                warn!(
                    %port, ring = index, base,
                    "its front-end said 0 of a ring that had been used: it goes on at its used index"
                );
            }
        }
        // Look at the ring once without waiting for a kick: frames may be there already.
        if let Some(binding) = binding {
            binding.activate();
        }
        Ok(())
    }

    fn stop_ring(&self, index: u16) -> Option<u32> {
        let queue = self.queue(index);
        let mut state = queue.lock();
        let stopped_at = state.stopped_at.take();
        let base = self.take_started(queue, index, &mut state).or(stopped_at)?;
        drop(state);
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            info!(port = %self.base.name, ring = index, base, suppressed, "ring stopped");
        }
        self.tell_whole_state();
        Some(base)
    }

    fn set_ring_enabled(&self, index: u16, enabled: bool) {
        let queue = self.queue(index);
        let mut state = queue.lock();
        if let Some(started) = &mut state.started {
            started.enabled = enabled;
            self.show(queue, index, &state);
        }
        let binding = state.binding.clone();
        drop(state);
        self.tell_whole_state();
        if let Some(binding) = binding {
            binding.activate();
        }
    }

    fn set_ring_call(&self, index: u16, call: Option<Arc<OwnedFd>>) -> Result<(), RingError> {
        if let Some(call) = &call {
            prepare_call(call)?;
        }
        let call = call.map(|fd| self.call_to(fd));
        let mut state = self.queue(index).lock();
        let Some(started) = &mut state.started else {
            return Ok(());
        };
        started.call.clone_from(&call);
        drop(state);
        // The old fd may have missed a call: one too many is harmless. A worker makes it, since it
        // may take long.
        let binding = self.transmit_queue(index / 2).lock().binding.clone();
        if let (Some(call), Some(binding)) = (call, binding) {
            binding.call(call);
        }
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) {
        self.frontend_mtu.store(mtu, Ordering::Relaxed);
    }

    fn announce(&self, mac: MacAddr) {
        if !lock(&self.announced).allow(mac, Instant::now()) {
            return;
        }
        let binding = self.transmit_queue(0).lock().binding.clone();
        if let Some(binding) = binding {
            binding.inject(self.base.id, rarp(mac));
        }
    }
}

impl VhostPort {
    fn call_to(&self, fd: Arc<OwnedFd>) -> Arc<Call> {
        Call::new(fd, Arc::clone(&self.callee))
    }
}

fn check_eventfd(which: &'static str, fd: &OwnedFd) -> Result<(), RingError> {
    if is_eventfd(fd) {
        Ok(())
    } else {
        Err(fd_error(which, std::io::Error::other("it is no eventfd")))
    }
}

/// Makes sure that a call fd is an eventfd, and has it not block, which its front-end can undo.
fn prepare_call(call: &OwnedFd) -> Result<(), RingError> {
    check_eventfd("call", call)?;
    rustix::fs::fcntl_getfl(call)
        .and_then(|flags| rustix::fs::fcntl_setfl(call, flags | rustix::fs::OFlags::NONBLOCK))
        .map_err(|error| fd_error("call", error.into()))
}

fn fd_error(which: &'static str, source: std::io::Error) -> RingError {
    RingError::Fd { which, source }
}
