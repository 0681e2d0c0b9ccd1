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
/// `to = *(u16 *)(from + offset)`.
pub const LOAD_HALF: u32 = bpf::BPF_LDX | bpf::BPF_MEM | bpf::BPF_H;
/// `*(u32 *)(to + offset) = from`.
pub const STORE_WORD: u32 = bpf::BPF_STX | bpf::BPF_MEM | bpf::BPF_W;
/// `*(u16 *)(to + offset) = from`.
pub const STORE_HALF: u32 = bpf::BPF_STX | bpf::BPF_MEM | bpf::BPF_H;
/// `*(u64 *)(to + offset) = immediate`.
pub const STORE_WIDE: u32 = bpf::BPF_ST | bpf::BPF_MEM | bpf::BPF_DW;
/// `to = from`.
pub const MOVE: u32 = bpf::BPF_ALU64 | bpf::BPF_MOV | bpf::BPF_X;
/// `to += immediate`.
pub const ADD: u32 = bpf::BPF_ALU64 | bpf::BPF_ADD | bpf::BPF_K;
/// `to` in network order, of as many bits as `immediate` says.
pub const TO_NETWORK: u32 = bpf::BPF_ALU | bpf::BPF_END | bpf::BPF_TO_BE;
/// `if to != immediate`, on by `offset`.
pub const UNLESS: u32 = bpf::BPF_JMP | bpf::BPF_JNE | bpf::BPF_K;
/// `if to > from`, on by `offset`.
pub const IF_GREATER: u32 = bpf::BPF_JMP | bpf::BPF_JGT | bpf::BPF_X;
/// On by `offset`.
pub const GO: u32 = bpf::BPF_JMP | bpf::BPF_JA;
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

/// A call of the kernel's function with this id.
pub const fn call_kernel(id: i32) -> Instruction {
    #[expect(clippy::cast_possible_truncation, reason = "it is 2")]
    let kind = bpf::BPF_PSEUDO_KFUNC_CALL as u8;
    Instruction::new(CALL, (0, kind), 0, id)
}

/// The id of a function that the kernel has for programs.
///
/// # Errors
/// It has none of this name, or tells nothing of its types (`ENOENT`).
pub fn kernel_function(name: &CStr) -> io::Result<i32> {
    silence();
    // SAFETY: no arguments. It gives null and an error number if there are none.
    let types = unsafe { bpf::btf__load_vmlinux_btf() };
    if types.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: types of the kernel and a C string.
    let id = unsafe { bpf::btf__find_by_name_kind(types, name.as_ptr(), bpf::BTF_KIND_FUNC) };
    // SAFETY: they are ours, and not used any more.
    unsafe { bpf::btf__free(types) };
    check(id)
}

/// Loads an XDP program for one interface's driver, which may call functions of the kernel.
///
/// # Errors
/// As [`load`], or a kernel that binds no program to an interface (`EINVAL`).
pub fn load_bound(name: &CStr, code: &[Instruction], interface: u32) -> io::Result<OwnedFd> {
    load_with(name, code, c"Dual MIT/GPL", Some(interface))
}

/// Loads an XDP program that takes frames in several buffers; `name` is what `bpftool prog` shows.
///
/// # Errors
/// No permission (`EPERM`); a program that the kernel doesn't accept (`EINVAL`, `EACCES`).
pub fn load(name: &CStr, code: &[Instruction]) -> io::Result<OwnedFd> {
    load_with(name, code, c"Apache-2.0", None)
}

fn load_with(
    name: &CStr,
    code: &[Instruction],
    license: &CStr,
    bound_to: Option<u32>,
) -> io::Result<OwnedFd> {
    silence();
    let binding = bound_to.map_or(0, |_| bpf::BPF_F_XDP_DEV_BOUND_ONLY);
    let mut options = bpf::bpf_prog_load_opts {
        sz: size_of::<bpf::bpf_prog_load_opts>() as bpf::size_t,
        expected_attach_type: bpf::BPF_XDP,
        prog_flags: bpf::BPF_F_XDP_HAS_FRAGS | binding,
        prog_ifindex: bound_to.unwrap_or(0),
        ..Default::default()
    };
    // SAFETY: name and license are C strings; the instructions are as many as said, laid out as the
    // kernel's; the options are valid and say how long they are.
    own(unsafe {
        bpf::bpf_prog_load(
            bpf::BPF_PROG_TYPE_XDP,
            name.as_ptr(),
            license.as_ptr(),
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
