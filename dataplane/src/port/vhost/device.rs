//! What a session does to a port: rings that start, stop and move, each under its lock.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use ringway_bridge::MacAddr;
use tracing::info;

use super::{CALL_BLOCKS, StartedRing, VhostPort};
use crate::memory::GuestMemory;
use crate::ring::{Areas, Layout, Ring};
use crate::vhost_user::{Device, RingAddresses, RingError, RingStart};
use crate::wire::rarp::rarp;
use crate::wire::{Features, Offloads, ProtocolFeatures};

impl Device for VhostPort {
    fn queue_pairs(&self) -> u16 {
        self.pairs()
    }

    fn connected(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    fn disconnected(&self, reason: Option<String>) {
        self.frontend_mtu.store(0, Ordering::Relaxed);
        self.set_features(Features::empty(), ProtocolFeatures::empty());
        self.set_last_error(reason);
    }

    fn set_features(&self, features: Features, protocol_features: ProtocolFeatures) {
        self.features.store(features.bits(), Ordering::Relaxed);
        self.protocol_features
            .store(protocol_features.bits(), Ordering::Relaxed);
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&memory);
        let mut result = Ok(());
        for (index, queue) in (0..).zip(&self.queues) {
            let mut state = queue.lock();
            let Some(started) = &mut state.started else {
                continue;
            };
            let shape = (started.ring.layout(), started.ring.size());
            match find_areas(index, shape, started.addresses, &memory) {
                Ok(at) => {
                    // SAFETY: `find_areas` checked the areas of a ring of this shape.
                    unsafe { started.ring.relocate(at, Arc::clone(&memory)) };
                }
                Err(error) => {
                    state.stopped_at = self.take_started(queue, index, &mut state);
                    result = Err(error);
                }
            }
        }
        result
    }

    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), RingError> {
        let Some(queue) = self.queue(index) else {
            return Err(RingError::Size {
                index,
                size: start.size,
            });
        };
        let memory = Arc::clone(&self.memory.lock().unwrap_or_else(PoisonError::into_inner));
        let (layout, base) = (Layout::of(start.features), start.base);
        let at = find_areas(index, (layout, start.size), start.addresses, &memory)?;
        if let Some(kick) = &start.kick {
            check_eventfd(index, "kick", kick)?;
        }
        if let Some(call) = &start.call {
            prepare_call(index, call)?;
        }
        let (is_transmit, features) = (index % 2 == 1, start.features);
        // SAFETY: `find_areas` checked size and areas of a ring of this layout in this memory.
        let ring = unsafe { Ring::new(start.size, at, base, features, memory) };
        let mut ring = ring.ok_or(RingError::Base { index, base })?;
        ring.disarm();
        // Asked after the first access: a break from here on is found by the workers.
        if ring.is_broken() {
            return Err(RingError::Broken { index });
        }
        let offloads = if is_transmit {
            Offloads::from_guest
        } else {
            Offloads::to_guest
        };
        let started = StartedRing {
            ring,
            enabled: start.enabled,
            offloads: offloads(features),
            addresses: start.addresses,
            kick: start.kick,
            call: start.call,
        };
        let mut state = queue.lock();
        self.take_started(queue, index, &mut state);
        state.stopped_at = None;
        let binding = state.binding.clone();
        if let (Some(kick), Some(binding)) = (&started.kick, &binding) {
            let watched = binding.watch(kick.as_fd());
            watched.map_err(|source| RingError::Fd {
                index,
                which: "kick",
                source,
            })?;
        }
        queue.size.store(start.size, Ordering::Relaxed);
        queue.is_enabled.store(started.enabled, Ordering::Relaxed);
        queue.is_started.store(true, Ordering::Relaxed);
        let enabled = started.enabled;
        state.started = Some(started);
        self.show_receiver(index, enabled);
        drop(state);
        info!(port = %self.base.name, ring = index, size = start.size, ?layout, base, enabled, "ring started");
        // Look at the ring once without waiting for a kick: frames may be there already.
        if let Some(binding) = binding {
            binding.activate();
        }
        Ok(())
    }

    fn stop_ring(&self, index: u16) -> Option<u32> {
        let queue = self.queue(index)?;
        let mut state = queue.lock();
        let stopped_at = state.stopped_at.take();
        let base = self.take_started(queue, index, &mut state).or(stopped_at)?;
        info!(port = %self.base.name, ring = index, base, "ring stopped");
        Some(base)
    }

    fn set_ring_enabled(&self, index: u16, enabled: bool) {
        let Some(queue) = self.queue(index) else {
            return;
        };
        let mut state = queue.lock();
        if let Some(started) = &mut state.started {
            started.enabled = enabled;
            queue.is_enabled.store(enabled, Ordering::Relaxed);
            self.show_receiver(index, enabled);
        }
        let binding = state.binding.clone();
        drop(state);
        if let Some(binding) = binding {
            binding.activate();
        }
    }

    fn set_ring_call(&self, index: u16, call: Option<OwnedFd>) -> Result<(), RingError> {
        if let Some(call) = &call {
            prepare_call(index, call)?;
        }
        let Some(queue) = self.queue(index) else {
            return Ok(());
        };
        let mut state = queue.lock();
        let Some(started) = &mut state.started else {
            return Ok(());
        };
        started.call = call;
        // The old fd may have missed a call: one too many is harmless.
        if started.call().is_err() {
            self.stop_in_worker(queue, &mut state, CALL_BLOCKS);
            let source = std::io::Error::other("writing to it blocks");
            return Err(RingError::Fd {
                index,
                which: "call",
                source,
            });
        }
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) {
        self.frontend_mtu.store(mtu, Ordering::Relaxed);
    }

    fn announce(&self, mac: MacAddr) {
        let binding = self.transmit_queue(0).lock().binding.clone();
        if let Some(binding) = binding {
            binding.inject(self.base.id, rarp(mac));
        }
    }
}

/// Host addresses of a ring's areas, if each lies in one region and is aligned (virtio 1.3, 2.7,
/// 2.8.10.1).
fn find_areas(
    index: u16,
    (layout, size): (Layout, u16),
    addresses: RingAddresses,
    memory: &GuestMemory,
) -> Result<Areas, RingError> {
    if !layout.allows(size) {
        return Err(RingError::Size { index, size });
    }
    let find = |area, address: u64, (bytes, align): (u64, u64)| {
        let error = |rule| RingError::Address {
            index,
            area,
            address,
            rule,
        };
        let host = memory.translate_user(address, bytes);
        let host = host.ok_or_else(|| error("inside one region of guest memory"))?;
        let aligned = u64::try_from(host.addr()).is_ok_and(|host| host.is_multiple_of(align));
        if aligned {
            Ok(host)
        } else {
            Err(error("aligned as virtio 1.3, 2.7 and 2.8.10.1 demand"))
        }
    };
    let [desc, driver, device] = layout.areas(size);
    Ok(Areas {
        desc: find("descriptor area", addresses.desc, desc)?,
        driver: find("driver area", addresses.avail, driver)?,
        device: find("device area", addresses.used, device)?,
    })
}

/// Makes sure that an fd is an eventfd. To poll or write anything else may block: a FUSE file's
/// poll, for one, waits for whoever serves it.
fn check_eventfd(index: u16, which: &'static str, fd: &OwnedFd) -> Result<(), RingError> {
    let error = |source| RingError::Fd {
        index,
        which,
        source,
    };
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let target = rustix::fs::readlink(link.as_str(), Vec::new()).map_err(|e| error(e.into()))?;
    if target.as_bytes().starts_with(b"anon_inode:[eventfd]") {
        Ok(())
    } else {
        Err(error(std::io::Error::other("it is no eventfd")))
    }
}

/// Makes sure that writing to a call fd does not block a worker: an eventfd, not blocking.
fn prepare_call(index: u16, call: &OwnedFd) -> Result<(), RingError> {
    check_eventfd(index, "call", call)?;
    let error = |source| RingError::Fd {
        index,
        which: "call",
        source,
    };
    let flags = rustix::fs::fcntl_getfl(call).map_err(|e| error(e.into()))?;
    let flags = flags | rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(call, flags).map_err(|e| error(e.into()))
}
