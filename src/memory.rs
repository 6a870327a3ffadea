//! A fixed region of memory: mapped once, resident from the first second, never grown.
//!
//! Before it: nothing; it is the ground the slabs and the upload buffers stand on.
//! After it: [`crate::slab`] hands regions to the kernel, [`crate::upload_buffer`] fills them with a gzip member.
//! Thread: made on the thread that owns it; an upload buffer's region moves to the uplink and back.
//! Allocates: once, in [`Region::map`].
//! Invariant: the address and the size of a region never change, and every byte of it is initialised (the kernel zeroes it).
//! Not here: any notion of what is in the bytes.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use tokio_uring::buf::{IoBuf, IoBufMut};

/// An anonymous private mapping, populated when it is made.
pub struct Region {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is owned by this value alone and is not tied to the thread that made it.
unsafe impl Send for Region {}

// SAFETY: through `&Region` the bytes can only be read.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `size` bytes and touches every page, so that resident memory does not grow later.
    pub fn map(size: usize) -> io::Result<Region> {
        assert!(size > 0, "an empty region has no address");
        // SAFETY: a null hint with no MAP_FIXED cannot replace an existing mapping.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Region { start, size })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `start` and `size` are those of the mapping made in `map`, unmapped only here.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.size) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `size` initialised bytes, and `&self` forbids a writer.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.size) }
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `size` initialised bytes, and `&mut self` is the only way to them.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.size) }
    }
}

// SAFETY: the address is that of a mapping and does not change when the value moves; all bytes are initialised.
unsafe impl IoBuf for Region {
    fn stable_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.size
    }

    fn bytes_total(&self) -> usize {
        self.size
    }
}

// SAFETY: as for `IoBuf`; there is no shorter initialised length to keep up to date.
unsafe impl IoBufMut for Region {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    unsafe fn set_init(&mut self, position: usize) {
        debug_assert!(position <= self.size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_zeroed_writable_and_keeps_its_address_when_moved() {
        let mut region = Region::map(12_288).unwrap();
        assert!(region.iter().all(|byte| *byte == 0));
        region[12_287] = 7;
        let address = region.as_ptr();
        let moved = std::thread::spawn(move || region).join().unwrap();
        assert_eq!(moved.as_ptr(), address);
        assert_eq!(moved[12_287], 7);
    }
}
