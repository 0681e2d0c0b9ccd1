//! Files that are neither memory nor eventfds, in each message that carries one: the session ends,
//! nobody waits for whoever serves them, and what does not close is bounded.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::os::fd::{AsFd, OwnedFd};

use common::eventually;
use common::hostile::Stage;
use ringway_api::PortState;
use vhost::vhost_user::message::FrontendReq;

/// A request that takes a file, with a body that is otherwise right.
fn requests() -> Vec<(FrontendReq, Vec<u8>)> {
    let words = |words: &[u64]| {
        words
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect::<Vec<_>>()
    };
    let user = 1 << 40;
    vec![
        (
            FrontendReq::SET_MEM_TABLE,
            words(&[1, 0, 64 << 10, user, 0]),
        ),
        (
            FrontendReq::ADD_MEM_REG,
            words(&[0, 1 << 45, 64 << 10, 1 << 45, 0]),
        ),
        (FrontendReq::SET_VRING_KICK, words(&[1])),
        (FrontendReq::SET_VRING_CALL, words(&[1])),
        (FrontendReq::SET_VRING_ERR, words(&[1])),
        (FrontendReq::SET_LOG_FD, Vec::new()),
        (FrontendReq::SET_LOG_BASE, words(&[4096, 0])),
        // One that is not offered, with a file that nobody would take.
        (FrontendReq::SET_BACKEND_REQ_FD, Vec::new()),
        (FrontendReq::GET_FEATURES, Vec::new()),
    ]
}

/// Gives a file in a request, which ends the session with a reason.
fn give(stage: &mut Stage, request: FrontendReq, body: &[u8], file: &OwnedFd) {
    let answer = stage.bad.frontend.request(request, body, &[file.as_fd()]);
    assert!(answer.is_err(), "{request:?}");
    eventually("the session ends", || {
        stage.detail().port.state == PortState::Down
    });
    let error = || stage.detail().last_error.unwrap_or_default();
    let why = "neither an eventfd nor shared memory";
    eventually("the reason is told", || error().contains(why));
}

#[test]
fn a_file_of_another_kind_ends_the_session_in_each_message() {
    let mut stage = Stage::new();
    let file: OwnedFd = std::fs::File::open("/proc/self/status").unwrap().into();
    let footprint = common::observe::Footprint::now();
    for (request, body) in requests() {
        give(&mut stage, request, &body, &file);
        stage.reconnect();
        stage.assert_works();
    }
    footprint.assert_flat();
    stage.finish();
}

mod as_root {
    #![allow(unsafe_code, reason = "userfaultfd")]

    use super::*;
    use common::fuse::SilentFuse;
    use common::observe::open_fds;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::net::UnixStream;

    /// Threads of this process with a name.
    fn threads(name: &str) -> usize {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|found| found.trim() == name)
            .count()
    }

    /// Memory whose first touch waits until this is dropped (userfaultfd(2)).
    struct SlowPage {
        fault: OwnedFd,
        page: *mut libc::c_void,
    }

    /// struct uffdio_api and uffdio_register, and their requests (linux/userfaultfd.h).
    const API: (u64, [u64; 3]) = (0xc018_aa3f, [0xaa, 0, 0]);
    const REGISTER: u64 = 0xc020_aa00;
    const MISSING: u64 = 1;
    const PAGE: usize = 4096;

    impl SlowPage {
        fn new() -> Self {
            // SAFETY: a new anonymous mapping touches nothing.
            let page = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_ne!(page, libc::MAP_FAILED);
            // SAFETY: it has no pointers among its arguments.
            let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            // SAFETY: the kernel just made it for us.
            let fault = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) };
            let (request, mut argument) = API;
            // SAFETY: the argument is of the size that the request says.
            let done = unsafe { libc::ioctl(fault.as_raw_fd(), request, argument.as_mut_ptr()) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            let mut argument = [page.addr() as u64, PAGE as u64, MISSING, 0];
            // SAFETY: likewise.
            let done = unsafe { libc::ioctl(fault.as_raw_fd(), REGISTER, argument.as_mut_ptr()) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            Self { fault, page }
        }

        /// Reads a pipe into the page, in a thread that has the pipe's lock when this returns, and
        /// keeps it.
        fn hold_lock(&self, pipe: &OwnedFd) -> std::thread::JoinHandle<()> {
            let pipe = pipe.try_clone().unwrap();
            let page = self.page.addr();
            let holder = std::thread::spawn(move || {
                let page = std::ptr::without_provenance_mut(page);
                // SAFETY: the page is mapped until the test ends.
                unsafe { libc::read(pipe.as_raw_fd(), page, PAGE) };
            });
            let mut fds = [rustix::event::PollFd::new(
                &self.fault,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).unwrap();
            holder
        }
    }

    /// A front-end can keep a pipe's lock for as long as it likes: whoever writes to the pipe waits for
    /// it, and nothing ends that. O_NONBLOCK is of no use.
    #[test]
    fn a_pipe_whose_lock_is_held_holds_up_nobody() {
        let mut stage = Stage::new();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let frontend = &mut stage.bad.frontend;
        for ring in [0_u64, 1] {
            let body = ring.to_ne_bytes();
            frontend
                .request(FrontendReq::SET_VRING_CALL, &body, &[writer.as_fd()])
                .unwrap();
        }
        rustix::io::write(&writer, &[0; PAGE]).unwrap();
        drop(writer);
        let slow = SlowPage::new();
        let holder = slow.hold_lock(&reader);
        // Calls for both rings, which nobody takes.
        stage.assert_works();
        stage.let_innocents_run(1000);
        stage.reconnect();
        stage.assert_works();
        stage.let_innocents_run(1000);
        assert_eq!(threads("ringway-relay"), 1, "it waits for the lock");
        drop(slow);
        holder.join().unwrap();
        eventually("the relay ends", || threads("ringway-relay") == 0);
        stage.finish();
    }

    /// A FUSE file whose server never answers: fstat, mmap, poll and even close would wait.
    #[test]
    fn a_file_whose_server_never_answers_holds_up_nobody() {
        let mut stage = Stage::new();
        let before_all = open_fds();
        let mut fuse = SilentFuse::mount();
        // Each stays open until its server answers; so many are borne.
        for (request, body) in requests().iter().take(7) {
            let file = fuse.open();
            give(&mut stage, *request, body, &file);
            stage.reconnect();
            stage.assert_works();
            stage.let_innocents_run(1000);
        }
        // Two more are too many: nobody may connect any longer.
        let file = fuse.open();
        let fds = [file.as_fd(); 2];
        let answer = stage
            .bad
            .frontend
            .request(FrontendReq::SET_LOG_FD, &[], &fds);
        assert!(answer.is_err());
        eventually("the session ends", || {
            stage.detail().port.state == PortState::Down
        });
        let before = stage.detail().connections;
        for _ in 0..20 {
            let mut front = UnixStream::connect(&stage.path).unwrap();
            let read = std::io::Read::read(&mut front, &mut [0]);
            assert!(matches!(read, Ok(0) | Err(_)), "turned away");
        }
        assert_eq!(stage.detail().connections, before);
        stage.let_innocents_run(1000);
        // Once the files are closed, the port is as good as before.
        drop(fuse);
        eventually("files are closed", || {
            open_fds() <= before_all && threads("ringway-close") == 0
        });
        stage.reconnect();
        stage.assert_works();
        stage.finish();
    }
}
