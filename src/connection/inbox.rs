//! The inbox: what was received of the requests in one slab.
//!
//! Before it: [`crate::slab`] has a free slab.
//! After it: [`crate::connection`] parses what is pending.
//! Thread: one reactor. Allocates: never.
//! Invariant: `begin ≤ received ≤ end ≤ slab size`; without TLS `received == end`.
//! Not here: what the bytes mean, and how ciphertext becomes plaintext ([`crate::connection::transport`]).
//!
//! ```text
//! slab:  | answered | head | body … | next request, pipelined … | part of a TLS record |        |
//!        0          begin                                       received               end     size
//! ```

use std::io;
use std::time::Instant;

use tokio_uring::net::TcpStream;

use crate::limits::HEAD_SIZE_MAX;
use crate::reactor::Core;
use crate::slab::Slab;
use crate::tls::Opened;

pub struct Inbox {
    pub slab: Slab,
    pub begin: usize,
    pub received: usize,
    pub end: usize,
}

impl Inbox {
    pub fn new(slab: Slab) -> Self {
        Inbox {
            slab,
            begin: 0,
            received: 0,
            end: 0,
        }
    }

    /// Bytes received and not yet answered.
    pub fn pending(&self) -> usize {
        self.received - self.begin
    }

    pub fn pending_bytes(&mut self) -> &[u8] {
        let range = self.begin..self.received;
        &self.slab.bytes()[range]
    }

    /// Whether nothing would be lost with the slab.
    pub fn is_empty(&self) -> bool {
        self.begin == self.end
    }

    /// Whether nothing more can be read here.
    pub fn is_full(&self) -> bool {
        self.end == self.slab.size()
    }

    /// Reads behind what is there; the number of bytes, 0 at the end of the stream.
    pub async fn read(&mut self, stream: &TcpStream) -> io::Result<usize> {
        let size = self.slab.read(stream, self.end).await?;
        self.end += size;
        Ok(size)
    }

    /// What was read is plaintext.
    pub fn take_all(&mut self) {
        self.received = self.end;
    }

    /// What was read is ciphertext, also what seemed to be pending.
    pub fn take_none(&mut self) {
        self.received = self.begin;
    }

    /// Ciphertext that is not opened.
    pub fn sealed(&mut self) -> &mut [u8] {
        let range = self.received..self.end;
        &mut self.slab.bytes()[range]
    }

    /// What became of [`Inbox::sealed`].
    pub fn opened(&mut self, opened: &Opened) {
        self.received += opened.plaintext;
        let end = self.received + opened.tail;
        assert!(end <= self.end, "opening makes it no longer");
        self.end = end;
    }

    /// Drops what came of the next `size` bytes, which nobody reads; how many of them are still to come.
    pub fn drop_unread(&mut self, size: usize) -> usize {
        let here = size.min(self.pending());
        self.begin += here;
        size - here
    }

    /// Moves the request to the start of the slab; by how much.
    pub fn rewind(&mut self) -> usize {
        let distance = self.begin;
        if distance > 0 {
            let range = self.begin..self.end;
            self.slab.bytes().copy_within(range, 0);
            self.begin = 0;
            self.received -= distance;
            self.end -= distance;
        }
        distance
    }

    /// Makes room for a whole head, as far as the slab has it.
    pub fn make_room_for_head(&mut self) {
        if self.is_empty() || self.begin + HEAD_SIZE_MAX > self.slab.size() {
            self.rewind();
        }
    }

    /// Goes on in another slab.
    pub fn move_to(&mut self, mut slab: Slab) {
        let range = self.begin..self.end;
        assert!(range.len() <= slab.size());
        slab.bytes()[..range.len()].copy_from_slice(&self.slab.bytes()[range]);
        self.slab = slab;
        self.received -= self.begin;
        self.end -= self.begin;
        self.begin = 0;
    }

    /// Gives a large slab back when a few pipelined bytes are all it still holds.
    pub async fn step_down(&mut self, core: &Core) {
        // With a part of a record it is likely to be needed at once.
        let is_small = self.received == self.end && self.pending() <= core.slabs.class_size(0);
        if self.slab.class_index() == 0 || !is_small {
            return;
        }
        // Only if there is one now: the large slab is in hand.
        if let Some(slab) = core.slabs.acquire(0, Instant::now()).await {
            self.move_to(slab);
        }
    }
}
