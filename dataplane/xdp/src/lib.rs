//! XDP programs of a few instructions, written down here rather than compiled by another tool, and
//! loaded by libbpf's wrappers of the system calls.
#![cfg(feature = "af-xdp")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Once;

use libbpf_sys as bpf;

/// Which hook of an interface a program is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// The driver's, before an skb is made.
    Driver,
    /// The kernel's own for any driver, after it.
    Generic,
}

/// `struct bpf_insn` (linux/bpf.h).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Source in the upper half on a little-endian machine, destination in the lower.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// `to = *(u32 *)(from + offset)`.
pub const LOAD_WORD: u32 = bpf::BPF_LDX | bpf::BPF_MEM | bpf::BPF_W;
/// `to =` 64 bits, in two places.
pub const LOAD_WIDE: u32 = bpf::BPF_LD | bpf::BPF_IMM | bpf::BPF_DW;
/// `to = immediate`.
pub const SET: u32 = bpf::BPF_ALU64 | bpf::BPF_MOV | bpf::BPF_K;
/// `r0 = function(r1, …)`.
pub const CALL: u32 = bpf::BPF_JMP | bpf::BPF_CALL;
/// `return r0`.
pub const EXIT: u32 = bpf::BPF_JMP | bpf::BPF_EXIT;

impl Instruction {
    /// An instruction on these registers.
    pub const fn new(code: u32, (to, from): (u8, u8), offset: i16, immediate: i32) -> Self {
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

/// Loads an XDP program that takes frames in several buffers; `name` is what `bpftool prog` shows.
///
/// # Errors
/// No permission (`EPERM`); a program that the kernel doesn't accept (`EINVAL`, `EACCES`).
pub fn load(name: &CStr, code: &[Instruction]) -> io::Result<OwnedFd> {
    silence();
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
            name.as_ptr(),
            c"Apache-2.0".as_ptr(),
            code.as_ptr().cast(),
            code.len() as bpf::size_t,
            &raw mut options,
        )
    })
}

/// Attaches a program to an interface for as long as the link lives: the kernel detaches it when
/// its last fd is closed, by whatever end of the process.
///
/// # Errors
/// There is a program already (`EBUSY`, `EEXIST`); the driver can't run one, or not with this MTU
/// (`EOPNOTSUPP`, `EINVAL`, `ERANGE`).
pub fn link(program: &OwnedFd, interface: u32, hook: Hook) -> io::Result<OwnedFd> {
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

/// Keeps libbpf from writing to stderr: errors are told by whoever meets them.
pub fn silence() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: no function is a valid choice.
        let _ = unsafe { bpf::libbpf_set_print(None) };
    });
}

/// An interface's index as the kernel's calls take it.
///
/// # Errors
/// One that no interface has.
pub fn as_int(interface: u32) -> io::Result<i32> {
    i32::try_from(interface).map_err(io::Error::other)
}

/// What a call of libbpf returned: an fd, or a negative error number.
///
/// # Errors
/// That error.
pub fn own(result: i32) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: libbpf returned a new fd, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a call of libbpf returned: a number that is not negative, or a negative error number.
///
/// # Errors
/// That error.
pub fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::from_raw_os_error(-result))
    } else {
        Ok(result)
    }
}
