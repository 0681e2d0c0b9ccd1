//! A vhost-user front-end: the requests that QEMU sends, in its order, and raw ones that it would
//! never send.
//!
//! Not the `vhost` crate's `Frontend`: that truncates vring bases to 16 bits (packed rings need
//! 32), takes the reply to GET_QUEUE_NUM, which is in pairs for a network device, as its limit of
//! vring indices, and sends no raw message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

use super::event::EventFd;
use super::features::VHOST_USER_F_PROTOCOL_FEATURES;
use super::memory::{DriverMemory, DriverMemoryError, RegionView};
use super::queue::RingPlace;

/// Bytes of a message's header: request, flags, size of the body, each a native-endian `u32`.
pub const HEADER_BYTES: usize = 12;

/// Longest body that a reply may have: 64 KiB is far above any that the protocol defines.
pub const MAX_REPLY_BYTES: usize = 1 << 16;

/// Most descriptors that one message carries here: the kernel's own limit (SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// Header flag: the protocol's version, 1.
const FLAG_VERSION: u32 = 1;
/// Header flag: this is a reply.
const FLAG_REPLY: u32 = 4;
/// Header flag: please acknowledge.
const FLAG_NEED_REPLY: u32 = 8;
/// In place of a descriptor: there is none, poll (bit 8 of SET_VRING_KICK's u64).
const NOFD: u64 = 1 << 8;

/// What a front-end asks for if the back-end offers it.
pub const WANTED_PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::MTU)
    .union(VhostUserProtocolFeatures::RARP)
    .union(VhostUserProtocolFeatures::STATUS)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Why a front-end failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontendError {
    /// The socket failed; `UnexpectedEof` if the back-end closed it.
    #[error("{request:?}")]
    Socket {
        /// What was being asked.
        request: FrontendReq,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Nobody is there to talk to.
    #[error("can't connect to {path}")]
    Connect {
        /// The socket's path.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The reply is none to the request.
    #[error("{request:?}: the back-end answered {reply}")]
    Reply {
        /// What was asked.
        request: FrontendReq,
        /// What came.
        reply: String,
    },
    /// The back-end acknowledged with an error.
    #[error("{request:?}: the back-end refused with {code}")]
    Refused {
        /// What was asked.
        request: FrontendReq,
        /// Its code, not zero.
        code: u64,
    },
    /// A ring isn't in driver memory.
    #[error(transparent)]
    Memory(#[from] DriverMemoryError),
}

/// A message from the back-end.
#[derive(Debug)]
pub struct FrontendReply {
    /// Request that it answers.
    pub request: u32,
    /// Header flags.
    pub flags: u32,
    /// Body.
    pub body: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// One session with a back-end.
#[derive(Debug)]
pub struct Frontend {
    socket: UnixStream,
    protocol_features: VhostUserProtocolFeatures,
}

impl Frontend {
    /// Connects to a back-end that listens at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn connect(path: &Path) -> Result<Self, FrontendError> {
        let socket = UnixStream::connect(path).map_err(|source| FrontendError::Connect {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self::new(socket))
    }

    /// Waits for a back-end that connects.
    ///
    /// # Errors
    /// The listener is unusable.
    pub fn accept(listener: &UnixListener) -> io::Result<Self> {
        Ok(Self::new(listener.accept()?.0))
    }

    /// A front-end on a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            protocol_features: VhostUserProtocolFeatures::empty(),
        }
    }

    /// The socket, for waiting on it, shutting it down or setting a time limit on replies.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Fails requests that the back-end leaves unanswered for this long.
    ///
    /// # Errors
    /// A limit of zero.
    pub fn set_reply_timeout(&self, limit: Duration) -> io::Result<()> {
        self.socket.set_read_timeout(Some(limit))
    }

    /// Protocol features that were negotiated.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol_features
    }

    /// Features and protocol features in QEMU's order: GET_FEATURES, GET_PROTOCOL_FEATURES,
    /// SET_PROTOCOL_FEATURES, SET_OWNER. Returns what the back-end offers.
    ///
    /// # Errors
    /// The back-end closed the socket or answered nonsense.
    pub fn negotiate_protocol(
        &mut self,
        wanted: VhostUserProtocolFeatures,
    ) -> Result<u64, FrontendError> {
        let offered = self.get_u64(FrontendReq::GET_FEATURES)?;
        if offered & VHOST_USER_F_PROTOCOL_FEATURES != 0 {
            let protocol = self.get_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
            let agreed = wanted & VhostUserProtocolFeatures::from_bits_truncate(protocol);
            let request = FrontendReq::SET_PROTOCOL_FEATURES;
            self.request(request, &agreed.bits().to_ne_bytes(), &[])?;
            self.protocol_features = agreed;
        }
        self.request(FrontendReq::SET_OWNER, &[], &[])?;
        Ok(offered)
    }

    /// SET_FEATURES: virtio features in effect.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn set_features(&mut self, features: u64) -> Result<(), FrontendError> {
        self.request(FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[])
    }

    /// GET_QUEUE_NUM: queue pairs that the back-end can have; 1 without the MQ protocol feature.
    ///
    /// # Errors
    /// The back-end closed the socket or answered nonsense.
    pub fn queue_pairs(&mut self) -> Result<u64, FrontendError> {
        if self
            .protocol_features
            .contains(VhostUserProtocolFeatures::MQ)
        {
            self.get_u64(FrontendReq::GET_QUEUE_NUM)
        } else {
            Ok(1)
        }
    }

    /// Shares memory: ADD_MEM_REG for each region if CONFIGURE_MEM_SLOTS was negotiated, as QEMU
    /// does, else SET_MEM_TABLE.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn share_memory(&mut self, memory: &DriverMemory) -> Result<(), FrontendError> {
        let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if !self.protocol_features.contains(slots) {
            return self.set_mem_table(memory);
        }
        self.get_u64(FrontendReq::GET_MAX_MEM_SLOTS)?;
        memory
            .regions()
            .try_for_each(|region| self.add_region(region))
    }

    /// SET_MEM_TABLE: all regions at once.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn set_mem_table(&mut self, memory: &DriverMemory) -> Result<(), FrontendError> {
        let count = u32::try_from(memory.regions().len()).unwrap_or(u32::MAX);
        let mut body = count.to_ne_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(memory.regions().flat_map(region_bytes));
        let fds: Vec<BorrowedFd<'_>> = memory.regions().map(|region| region.file).collect();
        self.request(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    /// ADD_MEM_REG: one more region.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn add_region(&mut self, region: RegionView<'_>) -> Result<(), FrontendError> {
        let mut body = vec![0; 8];
        body.extend(region_bytes(region));
        self.request(FrontendReq::ADD_MEM_REG, &body, &[region.file])
    }

    /// REM_MEM_REG: takes a region back.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn remove_region(&mut self, region: RegionView<'_>) -> Result<(), FrontendError> {
        let mut body = vec![0; 8];
        body.extend(region_bytes(region));
        self.request(FrontendReq::REM_MEM_REG, &body, &[])
    }

    /// Starts a ring: SET_VRING_NUM, BASE, ADDR, KICK, CALL. Without events the back-end polls
    /// and the driver gets no calls.
    ///
    /// The base goes out as [`RingPlace::base`] has it: for split rings the available index, for
    /// packed rings position and wrap counter, available in the low and used in the high half.
    ///
    /// # Errors
    /// The ring isn't in `memory`, the back-end closed the socket, or refused and said so.
    pub fn start_ring(
        &mut self,
        index: u32,
        memory: &DriverMemory,
        place: RingPlace,
        kick: Option<&EventFd>,
        call: Option<&EventFd>,
    ) -> Result<(), FrontendError> {
        let size = u32::from(place.size);
        self.vring_state(FrontendReq::SET_VRING_NUM, index, size)?;
        self.vring_state(FrontendReq::SET_VRING_BASE, index, place.base)?;
        self.set_vring_addr(index, memory, place)?;
        self.set_vring_fd(FrontendReq::SET_VRING_KICK, index, kick)?;
        self.set_vring_fd(FrontendReq::SET_VRING_CALL, index, call)
    }

    /// SET_VRING_ADDR, in this process's addresses as the protocol wants them.
    ///
    /// # Errors
    /// The ring isn't in `memory`, the back-end closed the socket, or refused and said so.
    pub fn set_vring_addr(
        &mut self,
        index: u32,
        memory: &DriverMemory,
        place: RingPlace,
    ) -> Result<(), FrontendError> {
        let mut body = Vec::with_capacity(40);
        body.extend(index.to_ne_bytes());
        body.extend(0u32.to_ne_bytes());
        for area in [place.desc, place.device, place.driver] {
            body.extend(memory.user_addr(area)?.to_ne_bytes());
        }
        body.extend(0u64.to_ne_bytes());
        self.request(FrontendReq::SET_VRING_ADDR, &body, &[])
    }

    /// SET_VRING_KICK, SET_VRING_CALL or SET_VRING_ERR; `None` says that there is no descriptor.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn set_vring_fd(
        &mut self,
        request: FrontendReq,
        index: u32,
        event: Option<&EventFd>,
    ) -> Result<(), FrontendError> {
        let index = u64::from(index);
        match event {
            Some(event) => self.request(request, &index.to_ne_bytes(), &[event.as_fd()]),
            None => self.request(request, &(index | NOFD).to_ne_bytes(), &[]),
        }
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn enable_ring(&mut self, index: u32, enable: bool) -> Result<(), FrontendError> {
        self.vring_state(FrontendReq::SET_VRING_ENABLE, index, u32::from(enable))
    }

    /// GET_VRING_BASE: stops a ring and returns its base in the form of [`RingPlace::base`].
    ///
    /// # Errors
    /// The back-end closed the socket or answered nonsense.
    pub fn stop_ring(&mut self, index: u32) -> Result<u32, FrontendError> {
        let request = FrontendReq::GET_VRING_BASE;
        self.send(request, 0, &vring_state(index, 0), &[])?;
        let reply = self.reply_to(request)?;
        match <[u8; 8]>::try_from(&reply.body[..]) {
            Ok([a, b, c, d, base @ ..]) if u32::from_ne_bytes([a, b, c, d]) == index => {
                Ok(u32::from_ne_bytes(base))
            }
            _ => Err(FrontendError::Reply {
                request,
                reply: format!("{:x?}", reply.body),
            }),
        }
    }

    /// Sends a request about a vring with one number.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn vring_state(
        &mut self,
        request: FrontendReq,
        index: u32,
        value: u32,
    ) -> Result<(), FrontendError> {
        self.request(request, &vring_state(index, value), &[])
    }

    /// NET_SET_MTU; nothing without the protocol feature.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), FrontendError> {
        if self
            .protocol_features
            .contains(VhostUserProtocolFeatures::MTU)
        {
            let request = FrontendReq::NET_SET_MTU;
            self.request(request, &u64::from(mtu).to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    /// SET_STATUS, as QEMU tells the driver's progress; nothing without the protocol feature.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn set_status(&mut self, status: u8) -> Result<(), FrontendError> {
        if self
            .protocol_features
            .contains(VhostUserProtocolFeatures::STATUS)
        {
            let request = FrontendReq::SET_STATUS;
            self.request(request, &u64::from(status).to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    /// SEND_RARP: the back-end announces this address from the port.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), FrontendError> {
        let [a, b, c, d, e, f] = mac;
        self.request(FrontendReq::SEND_RARP, &[a, b, c, d, e, f, 0, 0], &[])
    }

    /// Sends a request that has a number for a reply.
    ///
    /// # Errors
    /// The back-end closed the socket or answered nonsense.
    pub fn get_u64(&mut self, request: FrontendReq) -> Result<u64, FrontendError> {
        self.send(request, 0, &[], &[])?;
        self.u64_reply(request)
    }

    /// Sends a request without a reply of its own; with REPLY_ACK negotiated, waits for the
    /// acknowledgement.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn request(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        if !self
            .protocol_features
            .contains(VhostUserProtocolFeatures::REPLY_ACK)
        {
            return self.send(request, 0, body, fds);
        }
        self.send(request, FLAG_NEED_REPLY, body, fds)?;
        match self.u64_reply(request)? {
            0 => Ok(()),
            code => Err(FrontendError::Refused { request, code }),
        }
    }

    /// Sends any bytes with any descriptors, as one `sendmsg`.
    ///
    /// # Errors
    /// The back-end closed the socket, or the kernel refuses that many descriptors.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let iov = [IoSlice::new(bytes)];
        let sent = sendmsg(&self.socket, &iov, &mut control, SendFlags::NOSIGNAL)?;
        // A stream socket may take less; the descriptors went with the first byte.
        io::Write::write_all(&mut &self.socket, &bytes[sent..])
    }

    /// Reads the next message of the back-end, whatever it is.
    ///
    /// # Errors
    /// The back-end closed the socket or sent a body longer than [`MAX_REPLY_BYTES`].
    pub fn receive(&self) -> io::Result<FrontendReply> {
        let mut header = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut header)];
        // A socket with a timeout is not restarted after a signal by the kernel.
        let got = retry_on_intr(|| {
            recvmsg(
                &self.socket,
                &mut iov,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        let fds: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if got.bytes == 0 || got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        io::Read::read_exact(&mut &self.socket, &mut header[got.bytes..])?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let size = usize::try_from(word(8)).unwrap_or(usize::MAX);
        if size > MAX_REPLY_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a reply of {size} bytes"),
            ));
        }
        let mut body = vec![0; size];
        io::Read::read_exact(&mut &self.socket, &mut body)?;
        Ok(FrontendReply {
            request: word(0),
            flags: word(4),
            body,
            fds,
        })
    }

    fn send(
        &self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        let message = encode(request as u32, FLAG_VERSION | flags, body);
        self.send_raw(&message, fds)
            .map_err(|source| FrontendError::Socket { request, source })
    }

    fn reply_to(&self, request: FrontendReq) -> Result<FrontendReply, FrontendError> {
        let reply = self
            .receive()
            .map_err(|source| FrontendError::Socket { request, source })?;
        if reply.request == request as u32 && reply.flags & FLAG_REPLY != 0 {
            return Ok(reply);
        }
        Err(FrontendError::Reply {
            request,
            reply: format!("request {} with flags {:#x}", reply.request, reply.flags),
        })
    }

    fn u64_reply(&self, request: FrontendReq) -> Result<u64, FrontendError> {
        let reply = self.reply_to(request)?;
        <[u8; 8]>::try_from(&reply.body[..])
            .map(u64::from_ne_bytes)
            .map_err(|_| FrontendError::Reply {
                request,
                reply: format!("{} bytes", reply.body.len()),
            })
    }
}

/// A message with a true size field; flags as given.
pub fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    for word in [request, flags, size] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(body);
    message
}

fn vring_state(index: u32, value: u32) -> [u8; 8] {
    let [a, b, c, d] = index.to_ne_bytes();
    let [e, f, g, h] = value.to_ne_bytes();
    [a, b, c, d, e, f, g, h]
}

/// Guest address, size, address in this process, offset in the file.
fn region_bytes(region: RegionView<'_>) -> Vec<u8> {
    let layout = region.layout;
    [
        layout.guest_addr,
        layout.size,
        region.user_addr,
        layout.file_offset,
    ]
    .iter()
    .flat_map(|word| word.to_ne_bytes())
    .collect()
}
