//! The address space of a launch: device buffers and threadgroup arrays, with room between them.
//!
//! Kernels run on real addresses. Every access is announced before it happens, so that one which belongs to
//! no buffer is reported and never made; the gaps only have to be wide enough that a stray address is not
//! taken for the neighbour's.

use crate::index;
use crate::pages::Pages;
use crate::shadow::Shadow;
use candlewick_kernels::launch::MAX_THREADGROUP_BYTES;
use std::ops::Range;

/// Room before and after every device buffer.
const DEVICE_GAP: usize = 1 << 20;
/// Buffers start at a multiple of this, plus their alignment: aligned so, and not better.
const DEVICE_UNIT: usize = 4096;
/// Room before every threadgroup array, and again after it: as much as all arrays of a kernel may hold.
const THREADGROUP_GAP: usize = 32 << 10;
/// Distance between the starts of two threadgroup arrays.
const ARRAY_STRIDE: usize = 3 * THREADGROUP_GAP;
/// Arrays that a kernel may declare.
const MAX_ARRAYS: usize = 16;
/// What uninitialised memory holds: a NaN in every float type, and an absurd index.
const POISON: u8 = 0xff;

/// A named piece of memory with its shadow.
pub(crate) struct Region {
    pub(crate) name: String,
    pub(crate) addresses: Range<usize>,
    pub(crate) read_only: bool,
    pub(crate) shadow: Shadow,
}

impl Region {
    /// Whether all of an access lies in it.
    fn holds(&self, access: &Range<usize>) -> bool {
        self.addresses.start <= access.start && access.end <= self.addresses.end
    }

    /// How far an address is from its nearest byte.
    fn distance(&self, address: usize) -> usize {
        let after = (address + 1).saturating_sub(self.addresses.end);
        self.addresses.start.saturating_sub(address).max(after)
    }
}

/// A plan's buffer before the plan runs.
pub(crate) struct Initial<'a> {
    pub(crate) name: &'a str,
    pub(crate) contents: Contents<'a>,
    /// Its address is a multiple of this power of two, and of nothing larger.
    pub(crate) alignment: usize,
}

/// What a plan's buffer starts with.
pub(crate) enum Contents<'a> {
    /// The caller's bytes; kernels only read them.
    Given(&'a [u8]),
    /// So many bytes that hold nothing yet.
    Nothing(usize),
}

impl Contents<'_> {
    fn bytes(&self) -> usize {
        match self {
            Self::Given(bytes) => bytes.len(),
            Self::Nothing(bytes) => *bytes,
        }
    }
}

/// The buffers of a plan.
pub(crate) struct DeviceMemory {
    pages: Pages,
    regions: Vec<Region>,
}

impl DeviceMemory {
    pub(crate) fn new(buffers: &[Initial]) -> Self {
        let stride = |buffer: &Initial| (buffer.contents.bytes() + DEVICE_GAP).next_multiple_of(DEVICE_UNIT);
        let total: usize = buffers.iter().map(stride).sum();
        let mut pages = Pages::new(DEVICE_GAP + total + DEVICE_UNIT);
        let mut next = pages.address() + DEVICE_GAP;
        let mut regions = Vec::with_capacity(buffers.len());
        for buffer in buffers {
            let start = next + buffer.alignment;
            let addresses = start..start + buffer.contents.bytes();
            next += stride(buffer);
            let memory = pages.bytes_mut(&addresses);
            let read_only = match buffer.contents {
                Contents::Given(bytes) => {
                    memory.copy_from_slice(bytes);
                    true
                }
                Contents::Nothing(_) => {
                    memory.fill(POISON);
                    false
                }
            };
            regions.push(Region {
                name: buffer.name.to_owned(),
                shadow: Shadow::new(addresses.len(), read_only),
                addresses,
                read_only,
            });
        }
        Self { pages, regions }
    }

    /// The address of a buffer's first byte.
    pub(crate) fn address(&self, buffer: usize) -> usize {
        self.regions[buffer].addresses.start
    }

    /// What a buffer holds now.
    pub(crate) fn bytes(&self, buffer: usize) -> &[u8] {
        self.pages.bytes(&self.regions[buffer].addresses)
    }

    /// The first byte of a buffer that holds no value, and how many such bytes there are.
    pub(crate) fn unwritten(&self, buffer: usize) -> Option<(usize, usize)> {
        self.regions[buffer].shadow.unwritten()
    }

    /// Forgets who touched what: launches are ordered.
    pub(crate) fn next_launch(&mut self) {
        for region in &mut self.regions {
            region.shadow.next_launch();
        }
    }

    /// The buffer that holds all of `access`.
    pub(crate) fn find(&mut self, access: &Range<usize>) -> Option<&mut Region> {
        self.regions.iter_mut().find(|region| region.holds(access))
    }

    /// The buffer nearest to `address`, if that is any buffer's.
    pub(crate) fn nearest(&self, address: usize) -> Option<&Region> {
        self.pages.addresses().contains(&address).then_some(())?;
        self.regions.iter().min_by_key(|region| region.distance(address))
    }
}

/// Why a threadgroup array cannot be declared.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum DeclarationError {
    /// Another thread of the group declared something else in this place: what it declared.
    Differs(String),
    /// The arrays of the kernel are too many, or hold so many bytes together.
    TooLarge(usize),
}

/// The arrays of the threadgroup that is running.
pub(crate) struct ThreadgroupMemory {
    pages: Pages,
    arrays: Vec<Region>,
}

impl ThreadgroupMemory {
    pub(crate) fn new() -> Self {
        Self { pages: Pages::new(MAX_ARRAYS * ARRAY_STRIDE), arrays: Vec::new() }
    }

    pub(crate) fn clear(&mut self) {
        self.arrays.clear();
    }

    /// Bytes of all arrays declared so far.
    pub(crate) fn bytes(&self) -> usize {
        self.arrays.iter().map(|array| array.addresses.len()).sum()
    }

    /// The array that is the `order`-th one a thread declares: made for the first thread to come, found again
    /// for the others, which must declare the same.
    pub(crate) fn declare(
        &mut self,
        order: usize,
        name: &str,
        bytes: usize,
    ) -> Result<usize, DeclarationError> {
        if let Some(array) = self.arrays.get(order) {
            return if array.name == name && array.addresses.len() == bytes {
                Ok(array.addresses.start)
            } else {
                let declared = format!("{}, {} bytes", array.name, array.addresses.len());
                Err(DeclarationError::Differs(declared))
            };
        }
        let total = self.bytes() + bytes;
        if self.arrays.len() == MAX_ARRAYS || total > index(MAX_THREADGROUP_BYTES) {
            return Err(DeclarationError::TooLarge(total));
        }
        let start = self.pages.address() + order * ARRAY_STRIDE + THREADGROUP_GAP;
        let addresses = start..start + bytes;
        self.pages.bytes_mut(&addresses).fill(POISON);
        self.arrays.push(Region {
            name: name.to_owned(),
            shadow: Shadow::new(bytes, false),
            addresses,
            read_only: false,
        });
        Ok(start)
    }

    /// Whether an address belongs to threadgroup memory at all.
    pub(crate) fn contains(&self, address: usize) -> bool {
        self.pages.addresses().contains(&address)
    }

    /// The array that holds all of `access`.
    pub(crate) fn find(&mut self, access: &Range<usize>) -> Option<&mut Region> {
        self.arrays.iter_mut().find(|array| array.holds(access))
    }

    /// The array nearest to `address`.
    pub(crate) fn nearest(&self, address: usize) -> Option<&Region> {
        self.arrays.iter().min_by_key(|array| array.distance(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_as_asked_and_no_better() {
        for alignment in [4, 16, 256] {
            let given = [7; 100];
            let x = Initial { name: "x", contents: Contents::Given(&given), alignment };
            let y = Initial { name: "y", contents: Contents::Nothing(33), alignment };
            let memory = DeviceMemory::new(&[x, y]);
            for buffer in 0..2 {
                assert_eq!(memory.address(buffer) % (2 * alignment), alignment);
            }
            assert_eq!(memory.bytes(0), given);
            assert_eq!(memory.bytes(1), [POISON; 33]);
        }
    }

    #[test]
    fn accesses_are_found_whole_or_not_at_all() {
        let given = [0; 8];
        let x = Initial { name: "x", contents: Contents::Given(&given), alignment: 16 };
        let mut memory = DeviceMemory::new(&[x]);
        let x = memory.address(0);
        assert!(memory.find(&(x..x + 8)).is_some());
        assert!(memory.find(&(x + 4..x + 12)).is_none());
        assert_eq!(memory.nearest(x + 100).map(|r| r.name.as_str()), Some("x"));
        assert!(memory.nearest(16).is_none());
    }

    #[test]
    fn every_thread_declares_the_same_arrays() {
        let mut memory = ThreadgroupMemory::new();
        let first = memory.declare(0, "a", 64);
        assert_eq!(first, memory.declare(0, "a", 64));
        assert!(matches!(memory.declare(0, "a", 60), Err(DeclarationError::Differs(_))));
        assert_eq!(memory.declare(1, "b", 32 << 10), Err(DeclarationError::TooLarge(64 + (32 << 10))));
    }
}
