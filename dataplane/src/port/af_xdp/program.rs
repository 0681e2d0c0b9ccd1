//! The XDP program: frames of bound queues go to their sockets, all others to the kernel.
//!
//! Six instructions, so they are written down here rather than compiled by another tool:
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
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Once;

use libbpf_sys as bpf;

/// Offset of `rx_queue_index` in `struct xdp_md` (linux/bpf.h).
const RX_QUEUE_INDEX: i16 = 16;

/// The name by which `bpftool prog` and `bpftool map` show program and map.
const NAME: &std::ffi::CStr = c"ringway";

/// Which hook of the interface the program is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// The driver's, before an skb is made.
    Driver,
    /// The kernel's own for any driver, after it.
    Generic,
}

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
        let program = load(&map)?;
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

/// Keeps libbpf from writing to stderr: errors are told by whoever meets them.
fn silence() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: no function is a valid choice.
        let _ = unsafe { bpf::libbpf_set_print(None) };
    });
}

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

fn load(map: &OwnedFd) -> io::Result<OwnedFd> {
    let code = instructions(map.as_raw_fd());
    let mut options = bpf::bpf_prog_load_opts {
        sz: size_of::<bpf::bpf_prog_load_opts>() as bpf::size_t,
        expected_attach_type: bpf::BPF_XDP,
        prog_flags: bpf::BPF_F_XDP_HAS_FRAGS,
        ..Default::default()
    };
    // SAFETY: name and license are C strings; the instructions are as many as said, laid out as the
    // kernel's; the options are valid and say how long they are.
    own(unsafe {
        bpf::bpf_prog_load(
            bpf::BPF_PROG_TYPE_XDP,
            NAME.as_ptr(),
            c"Apache-2.0".as_ptr(),
            code.as_ptr().cast(),
            code.len() as bpf::size_t,
            &raw mut options,
        )
    })
}

fn link(program: &OwnedFd, interface: u32, hook: Hook) -> io::Result<OwnedFd> {
    let options = bpf::bpf_link_create_opts {
        sz: size_of::<bpf::bpf_link_create_opts>() as bpf::size_t,
        flags: match hook {
            Hook::Driver => bpf::XDP_FLAGS_DRV_MODE,
            Hook::Generic => bpf::XDP_FLAGS_SKB_MODE,
        },
        ..Default::default()
    };
    let (program, interface) = (program.as_raw_fd(), as_int(interface)?);
    // SAFETY: the options are valid and say how long they are.
    own(unsafe { bpf::bpf_link_create(program, interface, bpf::BPF_XDP, &raw const options) })
}

fn id_of(program: &OwnedFd) -> io::Result<u32> {
    let mut info = bpf::bpf_prog_info::default();
    let mut bytes = u32::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    let fd = program.as_raw_fd();
    // SAFETY: the structure is valid for as many bytes as said.
    check(unsafe { bpf::bpf_prog_get_info_by_fd(fd, &raw mut info, &raw mut bytes) })?;
    Ok(info.id)
}

/// `struct bpf_insn` (linux/bpf.h).
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Source in the upper half on a little-endian machine, destination in the lower.
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    const fn new(code: u32, (to, from): (u8, u8), offset: i16, immediate: i32) -> Self {
        let registers = if cfg!(target_endian = "little") {
            from << 4 | to
        } else {
            to << 4 | from
        };
        Self {
            #[expect(clippy::cast_possible_truncation, reason = "codes have eight bits")]
            code: code as u8,
            registers,
            offset,
            immediate,
        }
    }
}

fn instructions(map: i32) -> [Instruction; 6] {
    const LOAD_WORD: u32 = bpf::BPF_LDX | bpf::BPF_MEM | bpf::BPF_W;
    const LOAD_WIDE: u32 = bpf::BPF_LD | bpf::BPF_IMM | bpf::BPF_DW;
    const SET: u32 = bpf::BPF_ALU64 | bpf::BPF_MOV | bpf::BPF_K;
    const CALL: u32 = bpf::BPF_JMP | bpf::BPF_CALL;
    const EXIT: u32 = bpf::BPF_JMP | bpf::BPF_EXIT;
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

fn as_int(interface: u32) -> io::Result<i32> {
    i32::try_from(interface).map_err(io::Error::other)
}

/// An fd, or a negative error number.
fn own(result: i32) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: libbpf returned a new fd, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::from_raw_os_error(-result))
    } else {
        Ok(result)
    }
}
