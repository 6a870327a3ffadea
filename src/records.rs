//! Records: the events of one request body.
//!
//! Flow: a received (and inflated) body in its slab → **checked, split and compacted where it lies** → the envelope.
//! Lives on a reactor thread; allocates once, at start, for the largest body ([`RecordStarts::with_body_size_max`]).
//!
//! Invariant: the records of a body are adjacent and cover it, so a list of starts is a list of spans.
//! One bit per byte holds that list: its size is known before the first request, however small the records are.
//!
//! Not here: what a record means. A format's module knows grammar and nothing about fields.

pub mod json;

/// One bit per byte of a compacted body: set where a record starts.
pub struct RecordStarts {
    words: Box<[u64]>,
    body_size_max: usize,
}

/// What a checked body holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Records {
    /// Bytes of the compacted body; the records cover them without a gap.
    pub size: usize,
    /// Records in the body. Zero only for a body of empty top-level arrays.
    pub count: usize,
    /// Whether each record is a JSON object (true when there are none).
    pub all_objects: bool,
}

impl RecordStarts {
    /// Allocates one bit per byte of the largest body.
    pub fn with_body_size_max(body_size_max: usize) -> Self {
        // One word more than the bits need: `mark` writes a mask across a word boundary without asking.
        let word_count = body_size_max / 64 + 2;
        Self {
            words: vec![0; word_count].into_boxed_slice(),
            body_size_max,
        }
    }

    /// The records of `body`, the compacted bytes of the last successful check, in order.
    ///
    /// After a failed check the bits are those of the part before the error and mean nothing.
    pub fn iter<'a>(&'a self, body: &'a [u8]) -> RecordIter<'a> {
        let mut bits = Bits {
            words: &self.words[..self.words.len().min(body.len() / 64 + 1)],
            index: 0,
            word: 0,
        };
        bits.word = bits.words.first().copied().unwrap_or(0);
        let start_next = bits.next();
        RecordIter {
            body,
            bits,
            start_next,
        }
    }

    /// The size of the longest record of `body`, in bytes; 0 without records.
    /// Costs a scan of one word per 64 bytes of body, plus a step per record.
    pub fn record_size_max(&self, body: &[u8]) -> usize {
        self.iter(body).map(<[u8]>::len).max().unwrap_or(0)
    }

    /// Forgets every start of a body of `body_size` bytes; the cost follows this body, not the largest one.
    fn clear(&mut self, body_size: usize) {
        assert!(
            body_size <= self.body_size_max,
            "a body larger than its record starts"
        );
        self.words[..body_size / 64 + 2].fill(0);
    }

    /// Marks starts at `offset` + each set bit of `mask`.
    #[inline(always)]
    fn mark(&mut self, offset: usize, mask: u64) {
        let (index, shift) = (offset / 64, offset % 64);
        self.words[index] |= mask << shift;
        // Two shifts, because one by 64 is not defined.
        self.words[index + 1] |= mask >> 1 >> (63 - shift);
    }
}

/// Iterator over the records of a compacted body; see [`RecordStarts::iter`].
pub struct RecordIter<'a> {
    body: &'a [u8],
    bits: Bits<'a>,
    start_next: Option<usize>,
}

impl<'a> Iterator for RecordIter<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let start = self.start_next?;
        self.start_next = self.bits.next();
        // `get`, because `body` may be shorter than the body the bits were made for.
        self.body.get(
            start
                ..self
                    .start_next
                    .unwrap_or(self.body.len())
                    .min(self.body.len()),
        )
    }
}

/// The indexes of the set bits.
struct Bits<'a> {
    words: &'a [u64],
    index: usize,
    word: u64,
}

impl Iterator for Bits<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        while self.word == 0 {
            self.index += 1;
            self.word = *self.words.get(self.index)?;
        }
        let bit = self.word.trailing_zeros() as usize;
        self.word &= self.word - 1;
        Some(self.index * 64 + bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_run_from_start_to_start_across_words() {
        let mut starts = RecordStarts::with_body_size_max(300);
        let body: Vec<u8> = (0..=255).collect();
        for cuts in [
            &[0][..],
            &[0, 1, 2],
            &[0, 63, 64, 65],
            &[0, 100, 127, 128, 255],
        ] {
            starts.clear(300);
            for &cut in cuts {
                starts.mark(cut, 1);
            }
            let mut expected: Vec<&[u8]> = cuts
                .windows(2)
                .map(|pair| &body[pair[0]..pair[1]])
                .collect();
            expected.push(&body[cuts[cuts.len() - 1]..]);
            assert_eq!(starts.iter(&body).collect::<Vec<_>>(), expected);
            assert_eq!(
                starts.record_size_max(&body),
                expected.iter().map(|r| r.len()).max().unwrap()
            );
        }
    }

    #[test]
    fn a_mask_may_cross_a_word() {
        let mut starts = RecordStarts::with_body_size_max(200);
        starts.mark(0, 1);
        starts.mark(60, 1 | 1 << 4 | 1 << 63);
        let sizes: Vec<usize> = starts.iter(&[7; 130]).map(<[u8]>::len).collect();
        assert_eq!(sizes, [60, 4, 59, 7]);
    }

    #[test]
    fn no_start_means_no_record() {
        let starts = RecordStarts::with_body_size_max(0);
        assert_eq!(starts.iter(b"").count(), 0);
        assert_eq!(starts.record_size_max(b""), 0);
    }
}
