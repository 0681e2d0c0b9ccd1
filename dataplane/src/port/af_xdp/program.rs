//! The XDP program: frames of bound queues go to their sockets, all others to the kernel.
//!
//! Six instructions:
//!
//! ```text
//!   r2 = ctx->rx_queue_index                 the queue that the frame came in by
//!   r1 = map                                 the sockets, by queue
//!   r3 = XDP_PASS                            what to do if the queue has none
//!   return bpf_redirect_map(r1, r2, r3)
//! ```
//! Where a veth is, 25 come before these: the kernel leaves a frame's VLAN tag beside it, in the skb
//! of whoever sent it, and so XDP, which has the bytes alone, would lose it and a tagged frame enter
//! the untagged LAN. They ask for the tag and put it back in its place:
//!
//! ```text
//!   if bpf_xdp_metadata_rx_vlan_tag(ctx, &protocol, &tci) == 0
//!       bpf_xdp_adjust_head(ctx, -4)         room for four bytes
//!       addresses to the front, protocol and tci behind them
//! ```
//! (Documentation/networking/xdp-rx-metadata.rst.) The function is the kernel's, since 6.8; such a
//! program is bound to one interface, can't be used with generic XDP, and has to be under the GPL
//! too, as of two licences may be chosen.
//!
//! Neither reads the payload, hence frames in several buffers need no more than the flag that
//! says so. The link that attaches it belongs to this process: when its fd is closed, by whatever
//! end of the process, the kernel detaches the program.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use libbpf_sys as bpf;
use ringway_xdp::{
    ADD, CALL, EXIT, GO, Hook, IF_GREATER, Instruction, LOAD_HALF, LOAD_WIDE, LOAD_WORD, MOVE, SET,
    STORE_HALF, STORE_WIDE, STORE_WORD, TO_NETWORK, UNLESS, as_int, call_kernel, check,
    kernel_function, link, load, load_bound, own, silence,
};

/// Offset of `rx_queue_index` in `struct xdp_md` (linux/bpf.h).
const RX_QUEUE_INDEX: i16 = 16;

/// The name by which `bpftool prog` and `bpftool map` show program and map.
const NAME: &std::ffi::CStr = c"ringway";

/// What the kernel tells of an interface and XDP.
#[derive(Clone, Copy, Debug)]
pub(super) struct Support {
    /// The program that is attached to it.
    pub(super) program: Option<u32>,
    /// Whether the driver takes received frames in several buffers to programs; `None` if the
    /// kernel doesn't know.
    pub(super) several_buffers: Option<bool>,
    /// Whether the driver has zero-copy; `None` if the kernel doesn't know.
    pub(super) zero_copy: Option<bool>,
}

/// A program that is attached to an interface, until it is dropped.
#[derive(Debug)]
pub(super) struct Program {
    id: u32,
    map: OwnedFd,
    link: OwnedFd,
}

impl Program {
    /// Loads the program and attaches it to an interface that has none, for queues below `queues`.
    ///
    /// # Errors
    /// No permission (`EPERM`); there is a program already (`EBUSY`, `EEXIST`); the driver can't
    /// run one, or not with this MTU (`EOPNOTSUPP`, `EINVAL`, `ERANGE`).
    pub(super) fn attach(interface: u32, queues: u16, hook: Hook) -> io::Result<Self> {
        silence();
        let map = create_map(queues)?;
        let program = load(NAME, &redirecting(map.as_raw_fd()))?;
        Self::link(program, map, interface, hook)
    }

    /// The same by the driver's hook, with a program that puts back tags which the kernel knows of.
    ///
    /// # Errors
    /// As above, or a kernel that tells no program about tags (`ENOENT`, `EINVAL`).
    pub(super) fn attach_to_veth(interface: u32, queues: u16) -> io::Result<Self> {
        silence();
        let map = create_map(queues)?;
        let code = [
            &restoring_tags(kernel_function(TAG_FUNCTION)?)[..],
            &redirecting(map.as_raw_fd()),
        ];
        let program = load_bound(NAME, &code.concat(), interface)?;
        Self::link(program, map, interface, Hook::Driver)
    }

    fn link(program: OwnedFd, map: OwnedFd, interface: u32, hook: Hook) -> io::Result<Self> {
        let link = link(&program, interface, hook)?;
        Ok(Self {
            id: id_of(&program)?,
            map,
            link,
        })
    }

    /// The id by which `bpftool` and `ip link` name it.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Sends the frames of `queue` to an AF_XDP socket that is bound to it.
    ///
    /// # Errors
    /// A queue or fd that it can't be.
    pub(super) fn redirect(&self, queue: u16, socket: BorrowedFd<'_>) -> io::Result<()> {
        let key = u32::from(queue);
        let value = socket.as_raw_fd();
        let map = self.map.as_raw_fd();
        // SAFETY: the map has keys of four bytes and values of four bytes, which both are.
        let result = unsafe {
            bpf::bpf_map_update_elem(map, (&raw const key).cast(), (&raw const value).cast(), 0)
        };
        check(result).map(drop)
    }
}

impl Drop for Program {
    /// Detaches the program now. Closing the link does so too, but later if the process is being
    /// forked meanwhile and its child has not closed the link yet.
    fn drop(&mut self) {
        let link = self.link.as_raw_fd();
        // SAFETY: no pointers. If the interface is gone, so is the program.
        let _ = unsafe { bpf::bpf_link_detach(link) };
    }
}

/// Asks the kernel about an interface.
///
/// # Errors
/// Netlink does not answer.
pub(super) fn query(interface: u32) -> io::Result<Support> {
    silence();
    let mut answer = bpf::bpf_xdp_query_opts {
        sz: size_of::<bpf::bpf_xdp_query_opts>() as bpf::size_t,
        ..Default::default()
    };
    // SAFETY: the structure is valid and says how long it is.
    check(unsafe { bpf::bpf_xdp_query(as_int(interface)?, 0, &raw mut answer) })?;
    let ids = [
        answer.prog_id,
        answer.drv_prog_id,
        answer.hw_prog_id,
        answer.skb_prog_id,
    ];
    let features = answer.feature_flags;
    let has = |feature: u32| (features != 0).then_some(features & u64::from(feature) != 0);
    Ok(Support {
        program: ids.into_iter().find(|id| *id != 0),
        several_buffers: has(RX_SG),
        zero_copy: has(ZERO_COPY),
    })
}

/// `NETDEV_XDP_ACT_XSK_ZEROCOPY` (linux/netdev.h).
const ZERO_COPY: u32 = 8;

/// `NETDEV_XDP_ACT_RX_SG` (linux/netdev.h).
const RX_SG: u32 = 32;

fn create_map(queues: u16) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string, and options may be absent.
    own(unsafe {
        bpf::bpf_map_create(
            bpf::BPF_MAP_TYPE_XSKMAP,
            NAME.as_ptr(),
            4,
            4,
            u32::from(queues),
            std::ptr::null(),
        )
    })
}

fn id_of(program: &OwnedFd) -> io::Result<u32> {
    let mut info = bpf::bpf_prog_info::default();
    let mut bytes = u32::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    let fd = program.as_raw_fd();
    // SAFETY: the structure is valid for as many bytes as said.
    check(unsafe { bpf::bpf_prog_get_info_by_fd(fd, &raw mut info, &raw mut bytes) })?;
    Ok(info.id)
}

/// Tells a frame's tag to a program.
const TAG_FUNCTION: &std::ffi::CStr = c"bpf_xdp_metadata_rx_vlan_tag";

/// Puts a frame's tag back. Leaves the context in r1, as [`redirecting`] takes it.
fn restoring_tags(tag_function: i32) -> [Instruction; 32] {
    const ADJUST_HEAD: i32 = bpf::BPF_FUNC_xdp_adjust_head.cast_signed();
    const DROP: i32 = bpf::XDP_DROP.cast_signed();
    let op = Instruction::new;
    [
        op(MOVE, (6, 1), 0, 0),
        // Protocol and tag, two bytes each, in the eight bytes below r10.
        op(STORE_WIDE, (10, 0), -8, 0),
        op(MOVE, (2, 10), 0, 0),
        op(ADD, (2, 0), 0, -8),
        op(MOVE, (3, 10), 0, 0),
        op(ADD, (3, 0), 0, -4),
        call_kernel(tag_function),
        op(UNLESS, (0, 0), 23, 0),
        op(MOVE, (1, 6), 0, 0),
        op(SET, (2, 0), 0, -4),
        op(CALL, (0, 0), 0, ADJUST_HEAD),
        op(UNLESS, (0, 0), 17, 0),
        // From data to data_end there are 16 bytes: the verifier asks.
        op(LOAD_WORD, (1, 6), 0, 0),
        op(LOAD_WORD, (2, 6), 4, 0),
        op(MOVE, (3, 1), 0, 0),
        op(ADD, (3, 0), 0, 16),
        op(IF_GREATER, (3, 2), 12, 0),
        op(LOAD_WORD, (3, 1), 4, 0),
        op(STORE_WORD, (1, 3), 0, 0),
        op(LOAD_WORD, (3, 1), 8, 0),
        op(STORE_WORD, (1, 3), 4, 0),
        op(LOAD_WORD, (3, 1), 12, 0),
        op(STORE_WORD, (1, 3), 8, 0),
        op(LOAD_HALF, (3, 10), -8, 0),
        op(STORE_HALF, (1, 3), 12, 0),
        // The protocol is in network order, the tag is not.
        op(LOAD_HALF, (3, 10), -4, 0),
        op(TO_NETWORK, (3, 0), 0, 16),
        op(STORE_HALF, (1, 3), 14, 0),
        op(GO, (0, 0), 2, 0),
        op(SET, (0, 0), 0, DROP),
        op(EXIT, (0, 0), 0, 0),
        op(MOVE, (1, 6), 0, 0),
    ]
}

fn redirecting(map: i32) -> [Instruction; 6] {
    const REDIRECT_MAP: i32 = bpf::BPF_FUNC_redirect_map.cast_signed();
    const PASS: i32 = bpf::XDP_PASS.cast_signed();
    [
        Instruction::new(LOAD_WORD, (2, 1), RX_QUEUE_INDEX, 0),
        // One instruction in two places; as its source it names what kind of constant it is.
        #[expect(clippy::cast_possible_truncation, reason = "it is 1")]
        Instruction::new(LOAD_WIDE, (1, bpf::BPF_PSEUDO_MAP_FD as u8), 0, map),
        Instruction::new(0, (0, 0), 0, 0),
        Instruction::new(SET, (3, 0), 0, PASS),
        Instruction::new(CALL, (0, 0), 0, REDIRECT_MAP),
        Instruction::new(EXIT, (0, 0), 0, 0),
    ]
}
