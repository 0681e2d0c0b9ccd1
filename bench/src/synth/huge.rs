//! Hugepages of 2 MiB: taken from the kernel for a run and given back after it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::hint::hinted;

/// Bytes of such a page.
const PAGE_BYTES: u64 = 2 << 20;
/// Most pages that a load takes: one with more buffers than that makes do with pages of 4 KiB.
const MOST_OF_LOAD: u64 = 512;

/// Where the kernel keeps count; elsewhere in tests.
#[derive(Clone, Debug)]
struct Pool {
    total: PathBuf,
    free: PathBuf,
}

impl Pool {
    fn of_the_kernel() -> Self {
        Self {
            total: "/proc/sys/vm/nr_hugepages".into(),
            free: "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages".into(),
        }
    }
}

/// Pages of a load of so many bytes; `None` if it is too large for them.
pub(crate) fn pages_of_load(bytes: u64) -> Option<u64> {
    // A region per guest, each rounded up.
    let pages = bytes.div_ceil(PAGE_BYTES) + 16;
    (pages <= MOST_OF_LOAD).then_some(pages)
}

/// Pages that a run reserved; given back when dropped.
#[derive(Debug)]
pub(crate) struct HugePages {
    pool: Pool,
    added: u64,
}

impl HugePages {
    /// Sees to it that so many pages are free.
    ///
    /// # Errors
    /// The kernel has not that many in one piece, or this user may not ask for them.
    pub(crate) fn reserve(pages: u64) -> Result<Self> {
        Self::reserve_from(Pool::of_the_kernel(), pages)
    }

    fn reserve_from(pool: Pool, pages: u64) -> Result<Self> {
        let refused = |why: String| {
            hinted(
                format!("can't reserve {pages} hugepages of 2 MiB: {why}"),
                "free memory and be root, or do without them: --no-huge",
            )
        };
        let free = read_number(&pool.free).map_err(|e| refused(e.to_string()))?;
        let total = read_number(&pool.total).map_err(|e| refused(e.to_string()))?;
        let added = pages.saturating_sub(free);
        let reserved = Self { pool, added };
        if added > 0 {
            fs::write(&reserved.pool.total, (total + added).to_string())
                .map_err(|e| refused(e.to_string()))?;
            let got = read_number(&reserved.pool.free).map_err(|e| refused(e.to_string()))?;
            if got < pages {
                return Err(refused(format!("the kernel found only {got}")));
            }
        }
        Ok(reserved)
    }

    fn give_back(&self) -> Result<()> {
        let total = read_number(&self.pool.total).context("reading")?;
        let rest = total.saturating_sub(self.added);
        Ok(fs::write(&self.pool.total, rest.to_string())?)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.added > 0
            && let Err(error) = self.give_back()
        {
            eprintln!("{} hugepages stay reserved: {error:#}", self.added);
        }
    }
}

/// Pages of 2 MiB that nobody uses now.
pub(crate) fn free_pages() -> u64 {
    read_number(&Pool::of_the_kernel().free).unwrap_or(0)
}

fn read_number(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, path.display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel whose count of free pages doesn't follow what is asked for.
    fn pool(folder: &Path, total: u64, free: u64) -> Pool {
        let pool = Pool {
            total: folder.join("total"),
            free: folder.join("free"),
        };
        fs::write(&pool.total, total.to_string()).unwrap();
        fs::write(&pool.free, free.to_string()).unwrap();
        pool
    }

    #[test]
    fn pages_that_are_free_are_not_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(folder.path(), 20, 10);
        drop(HugePages::reserve_from(pool.clone(), 10).unwrap());
        assert_eq!(read_number(&pool.total).unwrap(), 20);
    }

    #[test]
    fn a_kernel_without_room_is_one_line_and_a_hint_and_gets_its_count_back() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(folder.path(), 20, 10);
        let error = HugePages::reserve_from(pool.clone(), 300).unwrap_err();
        assert_eq!(
            error.to_string(),
            "can't reserve 300 hugepages of 2 MiB: the kernel found only 10"
        );
        assert!(crate::hint::hint_of(&error).unwrap().contains("--no-huge"));
        assert_eq!(read_number(&pool.total).unwrap(), 20);
    }

    #[test]
    fn what_others_reserved_meanwhile_stays() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(folder.path(), 0, 0);
        let reserved = HugePages {
            pool: pool.clone(),
            added: 300,
        };
        fs::write(&pool.total, "350").unwrap();
        drop(reserved);
        assert_eq!(read_number(&pool.total).unwrap(), 50);
    }

    #[test]
    fn a_load_with_too_many_buffers_does_without() {
        assert_eq!(pages_of_load(1), Some(17));
        assert_eq!(pages_of_load(4 << 30), None);
    }
}
