//! The vhost-user wire format, without I/O: a header and a body of bytes with their fds become a
//! [`Request`] that holds only values of the right shape, and a [`Reply`] becomes bytes.
//!
//! ```text
//! 0        4        8        12
//! | request | flags  | size   | body: `size` bytes, native endian …
//!             bits 0-1 version = 1, bit 2 REPLY, bit 3 NEED_REPLY
//! ```
//!
//! Authority: QEMU's docs/interop/vhost-user.rst, "Message Specification" and "Front-end message
//! types". Fds that a request does not take are closed when the parser drops them.

use std::os::fd::OwnedFd;

use ringway_bridge::MacAddr;
use vhost::vhost_user::message::FrontendReq;

use crate::memory::RegionSpec;
use crate::ring::RingAddresses;

/// Bytes of a header.
pub(crate) const HEADER_LEN: usize = 12;

/// Longest body that is taken. The longest that we understand has 264 bytes (SET_MEM_TABLE); the
/// rest is room to skip messages that we don't, of which the longest known one (crypto sessions)
/// stays below 2 KiB.
pub(crate) const MAX_BODY: usize = 4096;

/// Most fds with one message: one for each region of SET_MEM_TABLE.
pub(crate) const MAX_FDS: usize = 8;

/// Most regions in SET_MEM_TABLE ("Memory regions description": region0 to region7).
const MAX_TABLE_REGIONS: u32 = 8;

/// Longest configuration space ("Virtio device config space": VHOST_USER_MAX_CONFIG_SIZE).
const MAX_CONFIG: usize = 256;
/// Offset, size and flags in front of it.
const CONFIG_HEAD: usize = 12;

/// Longest reply: GET_CONFIG's. All others have a body of 8 bytes.
pub(crate) const MAX_REPLY_LEN: usize = HEADER_LEN + CONFIG_HEAD + MAX_CONFIG;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0b11;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// SET_VRING_KICK, CALL and ERR: bits of the payload that hold the ring's index.
const VRING_INDEX_MASK: u64 = 0xff;
/// SET_VRING_KICK, CALL and ERR: no fd comes with the message.
const VRING_NOFD: u64 = 1 << 8;

/// Why bytes and fds are no request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CodecError {
    /// Another version of the protocol, or a reply where only requests may come.
    #[error("request {request} has flags {flags:#x}: {rule}")]
    Flags {
        request: u32,
        flags: u32,
        rule: &'static str,
    },
    /// A body longer than [`MAX_BODY`].
    #[error("the body of request {request} has {size} bytes, more than {MAX_BODY}")]
    TooLong { request: u32, size: u32 },
    /// A body of another size than the request's.
    #[error("the body of request {request} has {size} bytes")]
    BodySize { request: u32, size: usize },
    /// More or fewer fds than the request takes.
    #[error("{count} fds came with request {request}")]
    FdCount { request: u32, count: usize },
    /// A file that no request takes (see `foreign.rs`).
    #[error(
        "a file came with request {request} that is neither an eventfd nor shared memory (a memfd, or a \
         file of tmpfs or hugetlbfs), nor a pipe or Unix socket in an eventfd's place"
    )]
    ForeignFile { request: u32 },
    /// A pipe's other end, or a file without the right to read or to write.
    #[error("the pipe or socket of request {request} can't be read, or not written to")]
    Direction { request: u32 },
    /// A pipe or socket that is not served (see `relay.rs`).
    #[error("the pipe or socket of request {request} can't be served: those before hang")]
    Unserved { request: u32 },
    /// A value outside of its field's range.
    #[error("request {request} has a value of {value:#x}: {rule}")]
    Value {
        request: u32,
        value: u64,
        rule: &'static str,
    },
}

/// A message's header ("Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Which request, known or not.
    pub(crate) request: u32,
    /// The front-end asks for a reply even if the request has none of its own (REPLY_ACK).
    pub(crate) need_reply: bool,
    /// Bytes of the body, at most [`MAX_BODY`].
    pub(crate) body_len: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// Another version, a reply, or a body that is too long.
    pub(crate) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, CodecError> {
        let mut fields = FieldReader(bytes);
        let (request, flags, size) = (fields.u32(), fields.u32(), fields.u32());
        let bad_flags = |rule| CodecError::Flags {
            request,
            flags,
            rule,
        };
        if flags & VERSION_MASK != VERSION {
            return Err(bad_flags("only version 1 is spoken here"));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(bad_flags("a front-end sends no replies"));
        }
        let body_len = usize::try_from(size)
            .ok()
            .filter(|len| *len <= MAX_BODY)
            .ok_or(CodecError::TooLong { request, size })?;
        Ok(Self {
            request,
            need_reply: flags & FLAG_NEED_REPLY != 0,
            body_len,
        })
    }
}

/// The fd of SET_VRING_KICK, CALL or ERR.
#[derive(Debug)]
pub(crate) struct VringFd {
    /// The ring, below 256.
    pub(crate) index: u32,
    /// `None` with the flag "invalid FD": poll instead.
    pub(crate) fd: Option<OwnedFd>,
}

/// What a front-end asks for. Ring indices are as received, so not yet known to be in range.
#[derive(Debug)]
pub(crate) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    /// At most 8 regions, each with its file.
    SetMemTable(Vec<(RegionSpec, OwnedFd)>),
    /// Its log is not kept: LOG_SHMFD is not offered.
    SetLogBase,
    SetLogFd,
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr {
        index: u32,
        addresses: RingAddresses,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick(VringFd),
    SetVringCall(VringFd),
    SetVringErr(VringFd),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SendRarp(MacAddr),
    NetSetMtu(u64),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionSpec, OwnedFd),
    /// The mmap offset is ignored.
    RemMemReg(RegionSpec),
    SetStatus(u8),
    GetStatus,
    /// Its channel is kept open and never used: we ask nothing of front-ends.
    SetBackendReqFd,
    /// Offset and size, which lie in what a configuration space may have.
    GetConfig {
        offset: u32,
        size: u32,
    },
    /// What it would write is ignored: no field of it is the driver's to write (virtio 1.3, 5.1.4).
    SetConfig,
    /// A request that we don't know, or whose protocol feature we never offer.
    Unknown(u32),
}

impl Request {
    /// Reads the request that `header` announced. Takes all fds: those that the request keeps are
    /// in the result, the others are closed on return.
    ///
    /// # Errors
    /// A body or a number of fds that the request can't have, or a value out of range.
    pub(crate) fn parse(
        header: Header,
        body: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Self, CodecError> {
        let Ok(known) = FrontendReq::try_from(header.request) else {
            return Ok(Self::Unknown(header.request));
        };
        let message = Parts {
            request: header.request,
            body,
            fds,
        };
        Ok(match known {
            FrontendReq::GET_FEATURES => message.empty(Self::GetFeatures)?,
            FrontendReq::SET_FEATURES => Self::SetFeatures(message.u64()?),
            FrontendReq::SET_OWNER => message.empty(Self::SetOwner)?,
            FrontendReq::RESET_OWNER => message.empty(Self::ResetOwner)?,
            FrontendReq::SET_MEM_TABLE => Self::SetMemTable(message.mem_table()?),
            FrontendReq::SET_LOG_BASE => message.log_base()?,
            FrontendReq::SET_LOG_FD => message.closed_fd(Self::SetLogFd)?,
            FrontendReq::SET_VRING_NUM => {
                let (index, num) = message.vring_state()?;
                Self::SetVringNum { index, num }
            }
            FrontendReq::SET_VRING_ADDR => message.vring_addr()?,
            FrontendReq::SET_VRING_BASE => {
                let (index, base) = message.vring_state()?;
                Self::SetVringBase { index, base }
            }
            FrontendReq::GET_VRING_BASE => {
                let (index, _) = message.vring_state()?;
                Self::GetVringBase { index }
            }
            FrontendReq::SET_VRING_KICK => Self::SetVringKick(message.vring_fd()?),
            FrontendReq::SET_VRING_CALL => Self::SetVringCall(message.vring_fd()?),
            FrontendReq::SET_VRING_ERR => Self::SetVringErr(message.vring_fd()?),
            FrontendReq::GET_PROTOCOL_FEATURES => message.empty(Self::GetProtocolFeatures)?,
            FrontendReq::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(message.u64()?),
            FrontendReq::GET_QUEUE_NUM => message.empty(Self::GetQueueNum)?,
            FrontendReq::SET_VRING_ENABLE => message.vring_enable()?,
            FrontendReq::SEND_RARP => Self::SendRarp(message.mac()?),
            FrontendReq::NET_SET_MTU => Self::NetSetMtu(message.u64()?),
            FrontendReq::RESET_DEVICE => message.empty(Self::ResetDevice)?,
            FrontendReq::GET_MAX_MEM_SLOTS => message.empty(Self::GetMaxMemSlots)?,
            FrontendReq::ADD_MEM_REG => {
                let (spec, fd) = message.single_region(1..=1)?;
                match fd {
                    Some(fd) => Self::AddMemReg(spec, fd),
                    None => return Err(fd_count(header.request, 0)),
                }
            }
            FrontendReq::REM_MEM_REG => Self::RemMemReg(message.single_region(0..=1)?.0),
            FrontendReq::SET_STATUS => Self::SetStatus(message.status()?),
            FrontendReq::GET_STATUS => message.empty(Self::GetStatus)?,
            FrontendReq::SET_BACKEND_REQ_FD => message.closed_fd(Self::SetBackendReqFd)?,
            FrontendReq::GET_CONFIG => {
                let (offset, size) = message.config()?;
                Self::GetConfig { offset, size }
            }
            FrontendReq::SET_CONFIG => message.config().map(|_| Self::SetConfig)?,
            _ => Self::Unknown(header.request),
        })
    }

    /// Whether the front-end waits for a reply to an unknown request even without NEED_REPLY.
    /// SET_LOG_BASE is not among them: it has a reply only with LOG_SHMFD ("Communication").
    pub(crate) fn unknown_expects_reply(request: u32) -> bool {
        matches!(
            FrontendReq::try_from(request),
            Ok(FrontendReq::IOTLB_MSG
                | FrontendReq::CREATE_CRYPTO_SESSION
                | FrontendReq::POSTCOPY_ADVISE
                | FrontendReq::POSTCOPY_END
                | FrontendReq::GET_INFLIGHT_FD
                | FrontendReq::GET_SHARED_OBJECT
                | FrontendReq::SET_DEVICE_STATE_FD
                | FrontendReq::CHECK_DEVICE_STATE
                | FrontendReq::GET_SHMEM_CONFIG)
        )
    }
}

/// What goes back to the front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    /// The request that it answers.
    pub(crate) request: u32,
    /// The answer.
    pub(crate) body: ReplyBody,
}

/// A reply's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyBody {
    /// A number, or with REPLY_ACK zero for success and one for failure.
    U64(u64),
    /// A ring's base ("A vring state description").
    VringState { index: u32, num: u32 },
    /// A piece of the configuration space: `size` bytes from `offset` on. Those of which there is
    /// nothing to tell are zero.
    Config {
        offset: u32,
        size: u32,
        space: NetConfig,
    },
}

/// What the configuration space tells (virtio 1.3, 5.1.4): the fields of features that we offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetConfig {
    pub(crate) max_queue_pairs: u16,
    /// 0 if nobody configured one.
    pub(crate) mtu: u16,
}

impl NetConfig {
    /// VIRTIO_NET_S_LINK_UP.
    const LINK_UP: u16 = 1;

    /// All of it, little-endian as of virtio 1.0: an address that is left to the driver, the
    /// status, queue pairs and MTU.
    fn space(self) -> [u8; MAX_CONFIG] {
        let mut space = [0; MAX_CONFIG];
        let fields = [Self::LINK_UP, self.max_queue_pairs, self.mtu];
        for (at, field) in space[6..].chunks_exact_mut(2).zip(fields) {
            at.copy_from_slice(&field.to_le_bytes());
        }
        space
    }
}

impl Reply {
    /// The reply's bytes, each of them written: there is no padding.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(MAX_REPLY_LEN);
        match self.body {
            ReplyBody::U64(value) => body.extend(value.to_ne_bytes()),
            ReplyBody::VringState { index, num } => {
                body.extend([index, num].iter().flat_map(|field| field.to_ne_bytes()));
            }
            ReplyBody::Config {
                offset,
                size,
                space,
            } => {
                body.extend(
                    [offset, size, 0]
                        .iter()
                        .flat_map(|field| field.to_ne_bytes()),
                );
                // The parser saw that this lies in the space.
                let (from, len) = (offset as usize, size as usize);
                body.extend(space.space().iter().skip(from).take(len));
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_REPLY_LEN")]
        let header = [self.request, VERSION | FLAG_REPLY, body.len() as u32];
        let mut bytes: Vec<u8> = header
            .iter()
            .flat_map(|field| field.to_ne_bytes())
            .collect();
        bytes.append(&mut body);
        bytes
    }
}

/// A message whose body and fds still have to be checked.
struct Parts<'a> {
    request: u32,
    body: &'a [u8],
    fds: Vec<OwnedFd>,
}

impl<'a> Parts<'a> {
    fn exact_body<const N: usize>(&self) -> Result<&'a [u8; N], CodecError> {
        self.body.try_into().map_err(|_| self.bad_size())
    }

    fn bad_size(&self) -> CodecError {
        CodecError::BodySize {
            request: self.request,
            size: self.body.len(),
        }
    }

    fn bad_value(&self, value: u64, rule: &'static str) -> CodecError {
        CodecError::Value {
            request: self.request,
            value,
            rule,
        }
    }

    fn expect_fds(&self, count: usize) -> Result<(), CodecError> {
        if self.fds.len() == count {
            Ok(())
        } else {
            Err(fd_count(self.request, self.fds.len()))
        }
    }

    /// No body.
    fn empty(self, request: Request) -> Result<Request, CodecError> {
        self.exact_body::<0>()?;
        self.expect_fds(0)?;
        Ok(request)
    }

    /// An fd, which is closed.
    fn closed_fd(self, request: Request) -> Result<Request, CodecError> {
        self.exact_body::<0>()?;
        self.expect_fds(1)?;
        Ok(request)
    }

    /// Offset and size of a piece of the configuration space. The bytes themselves follow, in
    /// GET_CONFIG as room for the answer.
    fn config(&self) -> Result<(u32, u32), CodecError> {
        let (head, space) = self
            .body
            .split_first_chunk::<CONFIG_HEAD>()
            .ok_or_else(|| self.bad_size())?;
        self.expect_fds(0)?;
        let mut fields = FieldReader(head);
        let (offset, size) = (fields.u32(), fields.u32());
        if usize::try_from(size) != Ok(space.len()) {
            return Err(self.bad_size());
        }
        let end = u64::from(offset) + u64::from(size);
        if end > MAX_CONFIG as u64 {
            return Err(self.bad_value(end, "a configuration space has at most 256 bytes"));
        }
        Ok((offset, size))
    }

    /// Either a log description or, without LOG_SHMFD, an address.
    fn log_base(self) -> Result<Request, CodecError> {
        match (self.body.len(), self.fds.len()) {
            (8, 0) | (16, 0 | 1) => Ok(Request::SetLogBase),
            (8 | 16, count) => Err(fd_count(self.request, count)),
            _ => Err(self.bad_size()),
        }
    }

    fn u64(&self) -> Result<u64, CodecError> {
        let body = self.exact_body()?;
        self.expect_fds(0)?;
        Ok(u64::from_ne_bytes(*body))
    }

    fn status(&self) -> Result<u8, CodecError> {
        let value = self.u64()?;
        u8::try_from(value).map_err(|_| self.bad_value(value, "a device status has 8 bits"))
    }

    /// SEND_RARP: "The first 6 bytes of the payload contain the mac address".
    fn mac(&self) -> Result<MacAddr, CodecError> {
        let [a, b, c, d, e, f, _, _] = self.u64()?.to_ne_bytes();
        Ok(MacAddr([a, b, c, d, e, f]))
    }

    fn vring_state(&self) -> Result<(u32, u32), CodecError> {
        let body: &[u8; 8] = self.exact_body()?;
        self.expect_fds(0)?;
        let mut fields = FieldReader(body);
        Ok((fields.u32(), fields.u32()))
    }

    fn vring_enable(&self) -> Result<Request, CodecError> {
        let (index, num) = self.vring_state()?;
        let enable = match num {
            0 => false,
            1 => true,
            _ => return Err(self.bad_value(num.into(), "a ring is enabled by 1, disabled by 0")),
        };
        Ok(Request::SetVringEnable { index, enable })
    }

    fn vring_addr(&self) -> Result<Request, CodecError> {
        let body: &[u8; 40] = self.exact_body()?;
        self.expect_fds(0)?;
        let mut fields = FieldReader(body);
        let index = fields.u32();
        let _log_flags = fields.u32();
        let desc = fields.u64();
        let used = fields.u64();
        let avail = fields.u64();
        Ok(Request::SetVringAddr {
            index,
            addresses: RingAddresses { desc, avail, used },
        })
    }

    /// Bits beyond the index and the flag are refused: they would be a truncated index.
    fn vring_fd(mut self) -> Result<VringFd, CodecError> {
        let value = u64::from_ne_bytes(*self.exact_body()?);
        if value & !(VRING_INDEX_MASK | VRING_NOFD) != 0 {
            return Err(self.bad_value(value, "bits 9 to 63 are reserved"));
        }
        self.expect_fds(usize::from(value & VRING_NOFD == 0))?;
        let [index, ..] = (value & VRING_INDEX_MASK).to_le_bytes();
        Ok(VringFd {
            index: index.into(),
            fd: self.fds.pop(),
        })
    }

    /// The body may have room for more regions than it has: user-mode Linux sends two places, of
    /// which it counts those that it uses.
    fn mem_table(self) -> Result<Vec<(RegionSpec, OwnedFd)>, CodecError> {
        let (head, regions) = self
            .body
            .split_first_chunk::<8>()
            .ok_or_else(|| self.bad_size())?;
        let count = FieldReader(head).u32();
        if count > MAX_TABLE_REGIONS {
            return Err(self.bad_value(count.into(), "a memory table has at most 8 regions"));
        }
        let (places, rest) = regions.as_chunks::<REGION_LEN>();
        let is_table = places.len() <= MAX_TABLE_REGIONS as usize && rest.is_empty();
        let regions = places.get(..count as usize).filter(|_| is_table);
        let Some(regions) = regions else {
            return Err(self.bad_size());
        };
        self.expect_fds(regions.len())?;
        let specs = regions.iter().map(|region| FieldReader(region).region());
        Ok(specs.zip(self.fds).collect())
    }

    fn single_region(
        mut self,
        fds: std::ops::RangeInclusive<usize>,
    ) -> Result<(RegionSpec, Option<OwnedFd>), CodecError> {
        let body: &[u8; 8 + REGION_LEN] = self.exact_body()?;
        if !fds.contains(&self.fds.len()) {
            return Err(fd_count(self.request, self.fds.len()));
        }
        let mut fields = FieldReader(body);
        let _padding = fields.u64();
        Ok((fields.region(), self.fds.pop()))
    }
}

/// Bytes of a region in SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG.
const REGION_LEN: usize = 32;

fn fd_count(request: u32, count: usize) -> CodecError {
    CodecError::FdCount { request, count }
}

/// FieldReader in native byte order, read one after the other. The callers hold arrays of a size that
/// they checked; past the end there are zeros rather than a panic.
struct FieldReader<'a>(&'a [u8]);

impl FieldReader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        debug_assert!(self.0.len() >= N, "a field past the end");
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    fn region(&mut self) -> RegionSpec {
        let guest_addr = self.u64();
        let size = self.u64();
        let user_addr = self.u64();
        let mmap_offset = self.u64();
        RegionSpec {
            guest_addr,
            size,
            user_addr,
            mmap_offset,
        }
    }
}

#[cfg(test)]
mod tests;
