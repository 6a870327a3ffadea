//! JSON: checks a body in full, splits it into records and removes its insignificant white space, where it lies.
//!
//! Flow: a body in its slab → **[`Checker::check`]** → the envelope, which reads the records through
//! [`RecordStarts::iter`]. Lives on a reactor thread, one checker per core; a checker is allocated once, a call never
//! allocates, recurses or panics, whatever the bytes. This is the hot spot of the receiving side.
//!
//! A body is a sequence of objects and arrays with nothing but optional white space between them: one object, NDJSON,
//! concatenated objects. A top-level object is a record; each element of a top-level array is one, of any type,
//! and the array's own `[`, `,` and `]` disappear. The grammar is RFC 8259's, nesting is limited to [`DEPTH_MAX`].
//! Strings and numbers pass byte for byte: duplicate keys, `1e999` and `\ud800` are the reader's affair.
//!
//! Invariant: `kept_size ≤ offset ≤ body.len()`; what is before `kept_size` is compacted, what is after `offset` is as
//! it was sent. A body that is refused is left half compacted: nobody may read it.
//!
//! ```text
//! for each chunk of the body:
//!     classify  masks of what stays; the first byte of each token      (classify.rs)   reads beyond the chunk
//!     grammar   may these tokens follow each other; record starts      (grammar.rs)    reads the tokens only
//!     if either says no: find the first wrong byte, from the chunk's start            (explain.rs)
//!     squeeze   move what stays to the end of what was kept            (squeeze.rs)    overwrites up to the chunk's end
//! ```
//!
//! Departures, made for speed:
//! 1. The fast steps answer yes or no only. Because a chunk is not moved before it is right, and an error never shows
//!    in a later chunk than its own, one slow walk from the chunk's start finds the exact byte and line.
//! 2. A chunk and its masks stay in the first-level cache between the steps.
//! 3. Each step is compiled for three instruction sets from one text; the choice is made once (block.rs).
//!
//! Not here: what records mean, and other formats.

mod block;
mod classify;
mod explain;
mod grammar;
mod scalar;
mod squeeze;
#[cfg(test)]
mod tests;

use super::{RecordStarts, Records};
use crate::limits;
use block::{Arch, BLOCK_SIZE, Block, Job};
use classify::{Carry, Chunk};
use explain::Resume;
use grammar::{Marks, State};

/// Containers inside each other, at most.
pub const DEPTH_MAX: usize = limits::JSON_DEPTH_MAX;

/// Bytes classified before the first of them moves.
pub const CHUNK_SIZE: usize = limits::JSON_CHUNK_SIZE;

const _: () = assert!(CHUNK_SIZE.is_multiple_of(BLOCK_SIZE));
// The plan counts what a checker allocates.
const _: () = assert!(size_of::<Scratch>() <= limits::JSON_SCRATCH_FIXED_SIZE);

/// The values of [`JsonError::code`].
pub mod codes {
    /// A byte that the grammar does not allow where it stands.
    pub const SYNTAX: &str = "json_syntax";
    /// More than [`super::DEPTH_MAX`] containers inside each other.
    pub const DEPTH: &str = "json_depth";
    /// A string that is not UTF-8.
    pub const UTF8: &str = "json_utf8";
    /// The body ends inside a value.
    pub const TRUNCATED: &str = "json_truncated";
    /// A string, number or literal at the top.
    pub const SCALAR: &str = "json_scalar";
    /// No value at all.
    pub const EMPTY: &str = "empty_body";
}

/// Why a body is refused, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// One of [`codes`]; stable.
    pub code: &'static str,
    /// Offset in the body as sent of the first byte that cannot be right; the size of the body if it ends too early.
    /// For ill-formed UTF-8, the offset of the sequence.
    pub offset: usize,
    /// The line of that byte, counted from 1 by line feeds.
    pub line: usize,
    /// For people.
    pub detail: &'static str,
}

/// Which instructions a [`Checker`] uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// AVX-512 BW, VBMI and VBMI2, and GFNI.
    Avx512,
    /// AVX2 and BMI2.
    Avx2,
    /// What every machine has.
    Portable,
}

impl InstructionSet {
    const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Portable];

    /// Those of this machine, the fastest first. Never empty.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|set| set.arch().is_some())
    }

    fn arch(self) -> Option<Arch> {
        match self {
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512 => block::x86::Avx512::detect().map(Arch::Avx512),
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx2 => block::x86::Avx2::detect().map(Arch::Avx2),
            Self::Portable => Some(Arch::Portable(block::Portable)),
            #[cfg(not(all(target_arch = "x86_64", not(miri))))]
            _ => None,
        }
    }
}

/// Checks bodies, one after another; holds the scratch of one core.
pub struct Checker {
    arch: Arch,
    scratch: Box<Scratch>,
}

struct Scratch {
    chunk: Chunk,
    marks: Marks,
    state: State,
    resume: Resume,
}

impl Default for Checker {
    fn default() -> Self {
        Self::new()
    }
}

impl Checker {
    /// A checker for the best instructions that this machine has.
    pub fn new() -> Self {
        let arch = InstructionSet::ALL
            .into_iter()
            .find_map(InstructionSet::arch);
        Self::with_arch(arch.unwrap_or(Arch::Portable(block::Portable)))
    }

    /// A checker for the instructions of `set`; None if this machine does not have them.
    pub fn with_instruction_set(set: InstructionSet) -> Option<Self> {
        set.arch().map(Self::with_arch)
    }

    fn with_arch(arch: Arch) -> Self {
        let resume = Resume {
            offset: 0,
            newline_count: 0,
            carry: Carry::default(),
            state: State::new(),
            any: false,
        };
        let scratch = Scratch {
            chunk: Chunk::new(),
            marks: Marks::new(),
            state: State::new(),
            resume,
        };
        Self {
            arch,
            scratch: Box::new(scratch),
        }
    }

    /// Checks `body`, moves its records together at its front and marks where each of them starts.
    ///
    /// On success the first [`Records::size`] bytes are the records; the rest of `body` is stale.
    /// On failure `body` and `starts` are not to be used.
    ///
    /// # Panics
    /// If `body` is larger than `starts` was made for.
    pub fn check(
        &mut self,
        body: &mut [u8],
        starts: &mut RecordStarts,
    ) -> Result<Records, JsonError> {
        starts.clear(body.len());
        self.arch.run(Check {
            scratch: &mut self.scratch,
            body,
            starts,
        })
    }
}

/// The loop over the chunks, for [`Arch::run`] to compile three times.
struct Check<'a> {
    scratch: &'a mut Scratch,
    body: &'a mut [u8],
    starts: &'a mut RecordStarts,
}

impl Job for Check<'_> {
    type Output = Result<Records, JsonError>;

    #[inline(always)]
    fn run<B: Block>(self, block: B) -> Result<Records, JsonError> {
        let Check {
            scratch:
                Scratch {
                    chunk,
                    marks,
                    state,
                    resume,
                },
            body,
            starts,
        } = self;
        state.reset();
        marks.start_count = 0;
        marks.all_objects = true;
        let mut carry = Carry::default();
        let (mut offset, mut kept_size, mut newline_count, mut any) = (0, 0, 0, false);
        loop {
            let end = body.len().min(offset + CHUNK_SIZE);
            resume.offset = offset;
            resume.newline_count = newline_count;
            resume.carry = carry;
            resume.any = any;
            state.save_to(&mut resume.state);

            let mut valid = classify::classify(block, body, offset, end, &mut carry, chunk);
            valid = valid && grammar::check(block, chunk, state, marks);
            any |= chunk.token_count != 0;
            if end == body.len() {
                // Before squeezing, which relies on the last string being closed.
                valid &= carry.in_string == 0 && state.depth == 0 && any;
            }
            if !valid {
                return Err(explain::explain(body, resume).unwrap_or_else(|| disagreement(resume)));
            }
            kept_size = squeeze::squeeze(block, body, offset, end, kept_size, chunk, marks, starts);
            newline_count += chunk.newline_count;
            offset = end;
            if offset == body.len() {
                let (count, all_objects) = (marks.start_count, marks.all_objects);
                return Ok(Records {
                    size: kept_size,
                    count,
                    all_objects,
                });
            }
        }
    }
}

/// The fast steps refused what the explainer accepts: a defect of this module. Refused, as the careful choice.
#[cold]
fn disagreement(resume: &Resume) -> JsonError {
    debug_assert!(
        false,
        "the explainer found nothing wrong from offset {}",
        resume.offset
    );
    let (offset, line) = (resume.offset, 1 + resume.newline_count);
    JsonError {
        code: codes::SYNTAX,
        offset,
        line,
        detail: "not valid, at or after this byte",
    }
}
