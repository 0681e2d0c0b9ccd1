//! Lists whose allocation is kept while what they hold comes and goes.
//!
//! Guest slices must not outlive the lock under which they were found, but a worker is not to
//! allocate for each burst. So it keeps [`Kept`] storage, of which each use borrows an empty
//! [`List`]: what was in the list before can't be reached again.

use std::mem::MaybeUninit;

/// Values that may hold guest slices, by the lifetime of these.
pub(crate) trait Hold {
    /// The value for slices that live for `'m`.
    type For<'m>: Copy;
}

/// Storage for a list of `T`.
pub(crate) struct Kept<T: Hold> {
    items: Box<[MaybeUninit<T::For<'static>>]>,
}

// SAFETY: between uses nothing is read of what is in the storage.
unsafe impl<T: Hold> Send for Kept<T> {}

impl<T: Hold> Kept<T> {
    /// Room for `capacity` values.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            items: (0..capacity).map(|_| MaybeUninit::uninit()).collect(),
        }
    }

    /// An empty list of values that live for `'m`.
    #[inline]
    pub(crate) fn list<'m>(&'m mut self) -> List<'m, T::For<'m>> {
        let items: *mut [MaybeUninit<T::For<'static>>] = &raw mut *self.items;
        #[expect(clippy::unnecessary_cast, reason = "the types differ in a lifetime")]
        // SAFETY: the two types differ in a lifetime only, so they have one layout. What was
        // written for another lifetime is never read: the list begins empty, and reads what was
        // written through it only.
        let items = unsafe { &mut *(items as *mut [MaybeUninit<T::For<'m>>]) };
        List { items, len: 0 }
    }
}

impl<T: Hold> std::fmt::Debug for Kept<T> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Kept({})", self.items.len())
    }
}

/// A list of bounded length in borrowed storage.
pub(crate) struct List<'m, T> {
    items: &'m mut [MaybeUninit<T>],
    /// So many are written; no more than there are.
    len: usize,
}

impl<T: Copy> List<'_, T> {
    /// How many there are.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// How many more there is room for.
    #[inline(always)]
    pub(crate) fn room(&self) -> usize {
        self.items.len() - self.len
    }

    /// Forgets all.
    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Forgets all but the first `len`.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends a value; false if there is no room.
    #[inline]
    pub(crate) fn push(&mut self, value: T) -> bool {
        self.extend(1, || Some(value)) == 1
    }

    /// Appends what `next` gives, until it gives nothing or `most` were appended or there is no
    /// more room. Returns how many were.
    #[inline(always)]
    pub(crate) fn extend(&mut self, most: usize, mut next: impl FnMut() -> Option<T>) -> usize {
        let most = most.min(self.room());
        let mut count = 0;
        for item in &mut self.items[self.len..self.len + most] {
            let Some(value) = next() else { break };
            item.write(value);
            count += 1;
        }
        self.len += count;
        count
    }
}

impl<T: Copy> std::ops::Deref for List<'_, T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: the first `len` are written, and there are no fewer.
        unsafe { std::slice::from_raw_parts(self.items.as_ptr().cast(), self.len) }
    }
}

impl<T: Copy> std::ops::DerefMut for List<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: the first `len` are written, and there are no fewer.
        unsafe { std::slice::from_raw_parts_mut(self.items.as_mut_ptr().cast(), self.len) }
    }
}

impl<T: Copy + std::fmt::Debug> std::fmt::Debug for List<'_, T> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbers;

    impl Hold for Numbers {
        type For<'m> = &'m u32;
    }

    #[test]
    fn each_use_begins_empty_and_ends_at_the_capacity() {
        let mut kept = Kept::<Numbers>::new(3);
        {
            let numbers = [1, 2, 3, 4];
            let mut list = kept.list();
            let mut left = numbers.iter();
            assert_eq!(list.extend(2, || left.next()), 2);
            assert_eq!(list.extend(5, || left.next()), 1);
            assert!(!list.push(&numbers[0]));
            assert_eq!(list[..], [&1, &2, &3]);
            list.truncate(1);
            assert_eq!((list.len(), list.room()), (1, 2));
        }
        let list = kept.list();
        assert!(list.is_empty());
    }
}
