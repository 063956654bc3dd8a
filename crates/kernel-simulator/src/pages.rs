//! Memory that is written behind the compiler's back: by kernels, through plain addresses.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;

/// Zeroed memory at a fixed address. Pages that nobody touches cost nothing.
pub(crate) struct Pages {
    start: NonNull<u8>,
    layout: Layout,
}

impl Pages {
    /// At least `bytes` bytes, starting on a page.
    pub(crate) fn new(bytes: usize) -> Self {
        let layout = Layout::array::<Page>(bytes.div_ceil(PAGE_BYTES).max(1));
        let layout = layout.unwrap_or_else(|_| handle_alloc_error(Layout::new::<Page>()));
        // SAFETY: the layout holds at least one page.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, layout }
    }

    /// The address of the first byte. What is written through it is seen by [`bytes`](Self::bytes).
    pub(crate) fn address(&self) -> usize {
        self.start.as_ptr().expose_provenance()
    }

    pub(crate) fn addresses(&self) -> Range<usize> {
        self.address()..self.address() + self.layout.size()
    }

    /// The bytes at `addresses`, which must lie in these pages.
    pub(crate) fn bytes(&self, addresses: &Range<usize>) -> &[u8] {
        let offset = self.offset(addresses);
        // SAFETY: `offset` checked that the range lies in this allocation, which is initialised; kernels,
        // the only others who write here, do not run while the caller holds a borrow of `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), addresses.len()) }
    }

    pub(crate) fn bytes_mut(&mut self, addresses: &Range<usize>) -> &mut [u8] {
        let offset = self.offset(addresses);
        // SAFETY: as in `bytes`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), addresses.len()) }
    }

    fn offset(&self, addresses: &Range<usize>) -> usize {
        let all = self.addresses();
        assert!(
            all.start <= addresses.start && addresses.start <= addresses.end && addresses.end <= all.end,
            "{addresses:x?} is not in {all:x?}"
        );
        addresses.start - all.start
    }
}

const PAGE_BYTES: usize = 4096;

/// The unit and the alignment of [`Pages`].
#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "only its layout is used")] [u8; PAGE_BYTES]);

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
