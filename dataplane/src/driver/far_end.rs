//! What stands at the far end of a NIC port in tests and benches: an XDP program that sends frames and
//! swallows others, within the kernel, so that it costs less than what it measures.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use libbpf_sys as bpf;

use crate::bpf::{
    CALL, EXIT, Hook, Instruction, JUMP_UNLESS, LOAD_WORD, SET, as_int, check, link, load,
};

/// The name by which `bpftool prog` shows the program.
const NAME: &std::ffi::CStr = c"ringway_far_end";

/// Offset of `ingress_ifindex` in `struct xdp_md` (linux/bpf.h).
const INGRESS: i16 = 12;

/// Frames that the kernel makes at a time.
const BATCH: u32 = 64;

/// An interface that swallows all frames that arrive, until it is dropped, and sends copies of one.
/// Its statistics count what it swallows.
///
/// ```text
///   arrived here       -> XDP_DROP
///   run by hand        -> sent
/// ```
/// It is one program for both, as one that is attached is run by hand at once: for another, each run
/// takes two grace periods, some 25 ms.
#[derive(Debug)]
pub struct FarEnd {
    program: OwnedFd,
    _link: OwnedFd,
    frame: Vec<u8>,
}

impl FarEnd {
    /// Takes the interface with this index; `frame` is what it is to send.
    ///
    /// # Errors
    /// No permission (`EPERM`); there is a program already (`EBUSY`); the driver has no XDP
    /// (`EOPNOTSUPP`).
    pub fn attach(interface: u32, frame: Vec<u8>) -> io::Result<Self> {
        let program = load(NAME, &instructions(as_int(interface)?))?;
        Ok(Self {
            _link: link(&program, interface, Hook::Driver)?,
            program,
            frame,
        })
    }

    /// Sends so many frames; returns once they are on their way. A receiver without room loses some.
    /// To be called in the interface's namespace.
    ///
    /// # Errors
    /// A frame longer than some 3,500 bytes (`EINVAL`); a kernel before 5.18 (`EINVAL`).
    pub fn send(&self, count: u32) -> io::Result<()> {
        let mut options = bpf::bpf_test_run_opts {
            sz: size_of::<bpf::bpf_test_run_opts>() as bpf::size_t,
            data_in: self.frame.as_ptr().cast(),
            data_size_in: u32::try_from(self.frame.len()).map_err(io::Error::other)?,
            repeat: i32::try_from(count).map_err(io::Error::other)?,
            flags: bpf::BPF_F_TEST_XDP_LIVE_FRAMES,
            batch_size: BATCH,
            ..Default::default()
        };
        let program = self.program.as_raw_fd();
        // SAFETY: options and frame are valid for their lengths.
        check(unsafe { bpf::bpf_prog_test_run_opts(program, &raw mut options) }).map(drop)
    }
}

fn instructions(interface: i32) -> [Instruction; 8] {
    const REDIRECT: i32 = bpf::BPF_FUNC_redirect.cast_signed();
    const DROP: i32 = bpf::XDP_DROP.cast_signed();
    [
        Instruction::new(LOAD_WORD, (1, 1), INGRESS, 0),
        Instruction::new(JUMP_UNLESS, (1, 0), 2, interface),
        Instruction::new(SET, (0, 0), 0, DROP),
        Instruction::new(EXIT, (0, 0), 0, 0),
        Instruction::new(SET, (1, 0), 0, interface),
        Instruction::new(SET, (2, 0), 0, 0),
        Instruction::new(CALL, (0, 0), 0, REDIRECT),
        Instruction::new(EXIT, (0, 0), 0, 0),
    ]
}
