//! What stands at the far end of a NIC port in tests and benches: XDP programs that send frames or
//! swallow them, within the kernel, so that they cost less than what they measure.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use libbpf_sys as bpf;

use crate::bpf::{CALL, EXIT, Hook, Instruction, SET, as_int, check, link, load};

/// The name by which `bpftool prog` shows the programs.
const NAME: &std::ffi::CStr = c"ringway_far_end";

/// Frames that the kernel makes at a time.
const BATCH: u32 = 64;

/// Sends copies of one frame out of an interface.
#[derive(Debug)]
pub struct FrameSource {
    program: OwnedFd,
    frame: Vec<u8>,
}

impl FrameSource {
    /// Prepares to send `frame` out of the interface with this index.
    ///
    /// # Errors
    /// No permission (`EPERM`).
    pub fn new(interface: u32, frame: Vec<u8>) -> io::Result<Self> {
        const REDIRECT: i32 = bpf::BPF_FUNC_redirect.cast_signed();
        let code = [
            Instruction::new(SET, (1, 0), 0, as_int(interface)?),
            Instruction::new(SET, (2, 0), 0, 0),
            Instruction::new(CALL, (0, 0), 0, REDIRECT),
            Instruction::new(EXIT, (0, 0), 0, 0),
        ];
        Ok(Self {
            program: load(NAME, &code)?,
            frame,
        })
    }

    /// Sends so many frames; returns once they are on their way. A receiver without room loses some.
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

/// Swallows all frames that arrive at an interface, until it is dropped. Its statistics count them.
#[derive(Debug)]
pub struct FrameSink {
    _link: OwnedFd,
}

impl FrameSink {
    /// Attaches to the interface with this index.
    ///
    /// # Errors
    /// No permission (`EPERM`); there is a program already (`EBUSY`); the driver has no XDP
    /// (`EOPNOTSUPP`).
    pub fn attach(interface: u32) -> io::Result<Self> {
        const DROP: i32 = bpf::XDP_DROP.cast_signed();
        let code = [
            Instruction::new(SET, (0, 0), 0, DROP),
            Instruction::new(EXIT, (0, 0), 0, 0),
        ];
        let program = load(NAME, &code)?;
        Ok(Self {
            _link: link(&program, interface, Hook::Driver)?,
        })
    }
}
