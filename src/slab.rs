//! Slabs: fixed buffers in a few size classes, where requests are received and parsed.
//!
//! Before it: [`crate::reactor`] maps and registers them once.
//! After it: [`crate::connection`] takes one when its socket has something to read, and gives it back with the answer.
//! Thread: one reactor.
//! Allocates: at start only. Taking, reading into and giving back a slab allocate nothing.
//! Invariant: `free + parsing + in_kernel == count` in every class, and a slab never grows.
//! Not here: what the bytes mean; and lengths: a registered buffer remembers how far *earlier* requests filled it,
//! so the length of what is there always comes from the reads of this request.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Instant;

use tokio_uring::buf::BoundedBuf;
use tokio_uring::buf::fixed::{FixedBuf, FixedBufRegistry};
use tokio_uring::net::TcpStream;

use crate::config::{Registered, SlabClass};
use crate::limits::{SLAB_CLASS_COUNT_MAX, SLAB_COUNT_MAX};
use crate::memory::Region;
use crate::wait::WaitQueue;

struct Class {
    size: usize,
    count: usize,
    /// Registry indexes of the free slabs.
    free: RefCell<Vec<u16>>,
    in_kernel: Cell<usize>,
    queue: WaitQueue,
}

/// All slabs of one core.
pub struct Slabs {
    classes: Vec<Class>,
    registry: FixedBufRegistry<Region>,
    registered: bool,
}

/// How many slabs of one class are where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlabCounts {
    pub free: usize,
    pub parsing: usize,
    pub in_kernel: usize,
}

/// One slab, out of its class until it is dropped.
pub struct Slab {
    slabs: Rc<Slabs>,
    class_index: usize,
    /// Absent while the kernel has it.
    buffer: Option<FixedBuf>,
}

impl Slabs {
    /// Maps all slabs and registers them with the ring of the calling reactor.
    ///
    /// A refusal (usually the memlock limit) is returned beside the slabs, which then work unregistered;
    /// under [`Registered::Require`] it is the caller's to make it fatal.
    pub fn map(
        classes: &[SlabClass],
        registered: Registered,
        waiters_max: usize,
    ) -> io::Result<(Rc<Slabs>, Option<io::Error>)> {
        let slab_count: usize = classes.iter().map(|class| class.count).sum();
        assert!(
            slab_count <= SLAB_COUNT_MAX,
            "tokio-uring drops registered buffers beyond {SLAB_COUNT_MAX} silently"
        );
        let mut regions = Vec::with_capacity(slab_count);
        let mut held = Vec::with_capacity(classes.len());
        for class in classes {
            let first = regions.len();
            for _ in 0..class.count {
                regions.push(Region::map(class.size)?);
            }
            held.push(Class {
                size: class.size,
                count: class.count,
                free: RefCell::new(
                    (first..regions.len())
                        .rev()
                        .map(|index| index as u16)
                        .collect(),
                ),
                in_kernel: Cell::new(0),
                queue: WaitQueue::new(waiters_max),
            });
        }
        let registry = FixedBufRegistry::new(regions);
        let refusal = match registered {
            Registered::Never => None,
            Registered::Prefer | Registered::Require => registry.register().err(),
        };
        assert!(
            registry.check_out(slab_count - 1).is_some(),
            "the last slab must be in the registry"
        );
        let slabs = Slabs {
            classes: held,
            registry,
            registered: registered != Registered::Never && refusal.is_none(),
        };
        Ok((Rc::new(slabs), refusal))
    }

    /// Whether the kernel has the slabs pinned (`IORING_REGISTER_BUFFERS`).
    pub fn registered(&self) -> bool {
        self.registered
    }

    /// Bytes of the largest class: the largest request.
    pub fn size_max(&self) -> usize {
        self.classes.last().map_or(0, |class| class.size)
    }

    /// The smallest class that holds `size` bytes.
    pub fn class_for(&self, size: usize) -> Option<usize> {
        self.classes.iter().position(|class| class.size >= size)
    }

    pub fn class_count(&self) -> usize {
        self.classes.len()
    }

    pub fn class_size(&self, class_index: usize) -> usize {
        self.classes[class_index].size
    }

    pub fn counts(&self, class_index: usize) -> SlabCounts {
        let class = &self.classes[class_index];
        let free = class.free.borrow().len();
        let in_kernel = class.in_kernel.get();
        assert!(
            free + in_kernel <= class.count,
            "slabs appeared from nowhere"
        );
        SlabCounts {
            free,
            parsing: class.count - free - in_kernel,
            in_kernel,
        }
    }

    /// How many wait for a slab, by class.
    pub fn waiting(&self) -> [usize; SLAB_CLASS_COUNT_MAX] {
        let mut waiting = [0; SLAB_CLASS_COUNT_MAX];
        for (count, class) in waiting.iter_mut().zip(&self.classes) {
            *count = class.queue.waiting_count();
        }
        waiting
    }

    /// Takes a slab of the class, waiting in turn until `deadline`. `None` when it passes first.
    pub async fn acquire(self: &Rc<Self>, class_index: usize, deadline: Instant) -> Option<Slab> {
        let class = &self.classes[class_index];
        class
            .queue
            .until(Some(deadline), || self.take(class_index))
            .await
    }

    fn take(self: &Rc<Self>, class_index: usize) -> Option<Slab> {
        let index = self.classes[class_index].free.borrow_mut().pop()?;
        let buffer = self.registry.check_out(usize::from(index));
        assert!(buffer.is_some(), "a free slab is checked in");
        Some(Slab {
            slabs: self.clone(),
            class_index,
            buffer,
        })
    }
}

impl Slab {
    pub fn size(&self) -> usize {
        self.slabs.classes[self.class_index].size
    }

    pub fn class_index(&self) -> usize {
        self.class_index
    }

    /// All bytes of the slab; only what this request's reads returned means anything.
    pub fn bytes(&mut self) -> &mut [u8] {
        let buffer = self.buffer.as_mut().expect("the slab is not in the kernel");
        &mut buffer[..]
    }

    /// Reads from `stream` into `[begin..]` of the slab; the number of bytes read, 0 at the end of the stream.
    ///
    /// To be awaited to its end: a read cannot be cancelled, only made to fail by shutting the socket down.
    pub async fn read(&mut self, stream: &TcpStream, begin: usize) -> io::Result<usize> {
        let buffer = self.buffer.take().expect("the slab is not in the kernel");
        let end = buffer.bytes_total();
        assert!(begin < end, "a full slab cannot be read into");
        let in_kernel = &self.slabs.classes[self.class_index].in_kernel;
        in_kernel.set(in_kernel.get() + 1);
        let target = buffer.slice(begin..end);
        let (outcome, target) = if self.slabs.registered {
            stream.read_fixed(target).await
        } else {
            stream.read(target).await
        };
        in_kernel.set(in_kernel.get() - 1);
        self.buffer = Some(target.into_inner());
        outcome
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let class = &self.slabs.classes[self.class_index];
        // A slab whose future was dropped in mid-read (only when the runtime ends) stays with the kernel.
        if let Some(buffer) = self.buffer.take() {
            let index = buffer.buf_index();
            drop(buffer);
            let mut free = class.free.borrow_mut();
            assert!(free.len() < class.count, "a slab was given back twice");
            free.push(index);
            drop(free);
            class.queue.wake_one();
        }
    }
}
