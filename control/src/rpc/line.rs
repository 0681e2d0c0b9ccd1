//! Splits a stream into lines of bounded length.

use std::io::{self, Read};

/// Bytes asked of the stream at once.
const CHUNK: usize = 16 << 10;

/// Buffers above this are given back once their line is done: 128 idle connections hold 8 MiB.
const KEEP: usize = 64 << 10;

/// Why there is no line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The line is longer than the limit; the rest of the stream can't be told apart.
    #[error("a line is longer than {max} bytes")]
    TooLong {
        /// The limit.
        max: usize,
    },
    /// The stream failed.
    #[error("read: {0}")]
    Io(#[from] io::Error),
}

/// A reader of lines.
#[derive(Debug)]
pub struct Lines<R> {
    reader: R,
    max: usize,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that the last line took, newline included.
    taken: usize,
}

impl<R: Read> Lines<R> {
    /// Lines of `reader` of at most `max` bytes, the newline not counted.
    pub fn new(reader: R, max: usize) -> Self {
        Self {
            reader,
            max,
            buffer: Vec::new(),
            taken: 0,
        }
    }

    /// The stream, with what was read of it behind the last line.
    pub fn into_parts(mut self) -> (R, Vec<u8>) {
        self.discard_taken();
        (self.reader, self.buffer)
    }

    /// The stream.
    pub fn get_ref(&self) -> &R {
        &self.reader
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.reader
    }

    /// The next line without its newline; `None` at the end of the stream, where a line without a
    /// newline is no line.
    ///
    /// # Errors
    /// A line that is too long, or the stream's own error; nothing can be read afterwards.
    pub fn next_line(&mut self) -> Result<Option<&[u8]>, LineError> {
        self.discard_taken();
        let mut searched = 0;
        loop {
            let rest = self.buffer.get(searched..).unwrap_or_default();
            if let Some(at) = rest.iter().position(|b| *b == b'\n') {
                let end = searched + at;
                if end > self.max {
                    return Err(LineError::TooLong { max: self.max });
                }
                self.taken = end + 1;
                return Ok(self.buffer.get(..end));
            }
            searched = self.buffer.len();
            if searched > self.max {
                return Err(LineError::TooLong { max: self.max });
            }
            if self.fill()? == 0 {
                return Ok(None);
            }
        }
    }

    /// Whether the next line is here already, so that asking for it does not read.
    pub fn has_line(&self) -> bool {
        let rest = self.buffer.get(self.taken..).unwrap_or_default();
        rest.contains(&b'\n')
    }

    fn discard_taken(&mut self) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        if self.buffer.capacity() > KEEP && self.buffer.len() < KEEP {
            self.buffer.shrink_to(KEEP);
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        let old = self.buffer.len();
        self.buffer.resize(old + CHUNK, 0);
        let result = loop {
            let space = self.buffer.get_mut(old..).unwrap_or_default();
            match self.reader.read(space) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.buffer
            .truncate(old + result.as_ref().map_or(0, |n| *n));
        result
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Gives its bytes in pieces of `step`.
    struct Dribble<'a> {
        bytes: &'a [u8],
        step: usize,
    }

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.step.min(buffer.len()).min(self.bytes.len());
            let (now, later) = self.bytes.split_at(n);
            buffer[..n].copy_from_slice(now);
            self.bytes = later;
            Ok(n)
        }
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_bytes_arrive(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200),
            step in 1usize..50,
        ) {
            let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            let expected: Vec<_> = bytes[..whole]
                .split_inclusive(|b| *b == b'\n')
                .map(|line| line[..line.len() - 1].to_vec())
                .collect();
            let mut lines = Lines::new(Dribble { bytes: &bytes, step }, 1000);
            let mut seen = Vec::new();
            while let Some(line) = lines.next_line().unwrap() {
                seen.push(line.to_vec());
            }
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn a_line_at_the_limit_passes_and_one_byte_more_does_not() {
        assert_eq!(
            Lines::new(&b"12345\n"[..], 5).next_line().unwrap(),
            Some(&b"12345"[..])
        );
        assert!(matches!(
            Lines::new(&b"123456\n"[..], 5).next_line(),
            Err(LineError::TooLong { max: 5 })
        ));
    }

    #[test]
    fn an_endless_line_stops_at_the_limit() {
        let mut lines = Lines::new(io::repeat(b'x'), 1 << 20);
        assert!(matches!(lines.next_line(), Err(LineError::TooLong { .. })));
        assert!(lines.buffer.len() <= (1 << 20) + CHUNK);
    }
}
