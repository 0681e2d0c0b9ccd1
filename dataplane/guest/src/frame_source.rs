//! What stands at the far end of a NIC port in tests and benches: an XDP program that sends frames,
//! within the kernel, so that it costs less than what it measures.
//!
//! Frames to the far end are best left to the kernel, which drops those for somebody else: a
//! program there that drops them has a veth copy each first, and takes 1.3 times as long.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use libbpf_sys as bpf;

use ringway_xdp::{CALL, EXIT, Hook, Instruction, SET, as_int, check, link, load};

/// The name by which `bpftool prog` shows the program.
const NAME: &std::ffi::CStr = c"ringway_far_end";

/// Frames that the kernel makes at a time.
const BATCH: u32 = 64;

/// The loopback interface's index, in any namespace.
const LOOPBACK: u32 = 1;

/// Sends copies of one frame out of an interface.
#[derive(Debug)]
pub struct FrameSource {
    program: OwnedFd,
    /// A program that is attached somewhere is run by hand at once: else each run takes two grace
    /// periods, some 25 ms.
    _link: OwnedFd,
    frame: Vec<u8>,
}

impl FrameSource {
    /// Prepares to send `frame` out of the interface with this index, in a namespace of its own:
    /// what passes the loopback interface there goes the same way.
    ///
    /// # Errors
    /// No permission (`EPERM`); another source in the same namespace (`EBUSY`).
    pub fn new(interface: u32, frame: Vec<u8>) -> io::Result<Self> {
        let program = load(NAME, &instructions(as_int(interface)?))?;
        Ok(Self {
            _link: link(&program, LOOPBACK, Hook::Generic)?,
            program,
            frame,
        })
    }

    /// Sends so many frames; returns once they are on their way. A receiver without room loses
    /// some. To be called in the same namespace.
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

fn instructions(interface: i32) -> [Instruction; 4] {
    const REDIRECT: i32 = bpf::BPF_FUNC_redirect.cast_signed();
    [
        Instruction::new(SET, (1, 0), 0, interface),
        Instruction::new(SET, (2, 0), 0, 0),
        Instruction::new(CALL, (0, 0), 0, REDIRECT),
        Instruction::new(EXIT, (0, 0), 0, 0),
    ]
}
