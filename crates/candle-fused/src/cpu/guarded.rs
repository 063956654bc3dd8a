//! Memory that ends at a page nobody may touch, for the tests of unsafe loops.

use std::{ptr, slice};

pub(crate) struct Guarded<T> {
    pages: *mut libc::c_void,
    size: usize,
    first: *mut T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    pub(crate) fn new(values: &[T]) -> Self {
        const PAGE: usize = 1 << 16;
        let bytes = size_of_val(values);
        let usable = bytes.next_multiple_of(PAGE);
        let size = usable + PAGE;
        // SAFETY: a fresh private mapping, whose last page is then closed; the values fit before it.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let pages = libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert!(pages != libc::MAP_FAILED);
            assert_eq!(libc::mprotect(pages.byte_add(usable), PAGE, libc::PROT_NONE), 0);
            let first = pages.byte_add(usable - bytes).cast::<T>();
            ptr::copy_nonoverlapping(values.as_ptr(), first, values.len());
            Self { pages, size, first, len: values.len() }
        }
    }

    pub(crate) fn get(&self) -> &[T] {
        // SAFETY: initialised by `new`.
        unsafe { slice::from_raw_parts(self.first, self.len) }
    }

    pub(crate) fn get_mut(&mut self) -> &mut [T] {
        // SAFETY: initialised by `new`, and borrowed by nobody else.
        unsafe { slice::from_raw_parts_mut(self.first, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { libc::munmap(self.pages, self.size) };
    }
}
