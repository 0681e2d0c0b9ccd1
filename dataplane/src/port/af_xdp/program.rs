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
//! It reads nothing of the frame, hence frames in several buffers need no more than the flag that
//! says so. The link that attaches it belongs to this process: when its fd is closed, by whatever
//! end of the process, the kernel detaches the program.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use libbpf_sys as bpf;
use ringway_xdp::{
    CALL, EXIT, Hook, Instruction, LOAD_WIDE, LOAD_WORD, SET, as_int, check, link, load, own,
    silence,
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
        let program = load(NAME, &instructions(map.as_raw_fd()))?;
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

fn instructions(map: i32) -> [Instruction; 6] {
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
