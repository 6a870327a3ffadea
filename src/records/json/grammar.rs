//! Step 2, grammar: whether the tokens of a chunk may follow each other, and where its records start.
//!
//! Between classify, which lists the first byte of every token, and squeeze, which wants to know the tokens that start
//! a record and those that are dropped. Works on token *numbers*: no positions, no bytes of the body.
//! Never allocates.
//!
//! Invariant: a token that may not stand where it stands is found at that token, from what is before it.
//!
//! Not here: what is inside strings and scalars (checked already), and which error it is ([`super::explain`]).
//!
//! ```text
//! for each token:
//!     by the token before it: `:` after a key only, a value after `:` `,` `[`, no value after a value, ...
//!     by the container it stands in: `:` not in arrays, `,` not at the top, keys after `,` in objects, ...
//!     `{` `[` push a kind; `}` `]` pop one
//!     at the top `{` starts a record; in a top-level array every value does, and `[` `,` `]` are dropped
//! ```
//!
//! Departures, made for speed:
//! 1. 64 tokens at a time: each rule is a few operations on masks, "the token before" is a shift by one.
//! 2. What depends on the container is a mask per kind of container, precomputed for all 64 tokens. Only brackets are
//!    visited one by one, and each selects, for the tokens since the last, the mask of the kind they stand in.
//! 3. The visit asks only whether it is at the top, which is rare in a deep document and regular in a stream of flat
//!    ones. It has no other branch: the kind is stored above the top of the stack even when the bracket closes (the
//!    next one that opens overwrites it), and a bracket of the wrong kind is an error of its container's mask.
//! 4. The depth is a `u8` and the stack has 256 slots, so it needs no bounds check. Going above the limit is seen in the
//!    highest depth reached, below zero in the mask of the top; either way what was written by then is not used.

use super::DEPTH_MAX;
use super::block::{BLOCK_SIZE, Block};
use super::classify::{BLOCK_COUNT, Chunk};

/// Kinds of containers. Bit 0 is "object", bit 1 "its values are records".
pub(super) const ARRAY: u8 = 0;
pub(super) const OBJECT: u8 = 1;
const TOP_ARRAY: u8 = 2;
const TOP: u8 = 3;

const _: () = assert!(
    DEPTH_MAX + BLOCK_SIZE < 256,
    "64 brackets from the deepest level must not wrap unseen"
);

/// The grammar between two tokens.
#[derive(Clone, Copy)]
pub(super) struct State {
    /// Kinds of the containers around the next token, outermost first; slot 0 is the top.
    pub kinds: [u8; 256],
    pub depth: u8,
    pub before: Before,
}

/// The token before the next one, one bit each (0 or 1).
#[derive(Clone, Copy, Default)]
pub(super) struct Before {
    pub brace: u64,
    pub bracket: u64,
    pub comma: u64,
    pub colon: u64,
    /// A string just after `{` or `,`: a key, if an object is around it.
    pub key: u64,
    pub scalar: u64,
    pub closer: u64,
}

impl State {
    pub fn new() -> Self {
        let mut kinds = [0; 256];
        kinds[0] = TOP;
        Self {
            kinds,
            depth: 0,
            before: Before::default(),
        }
    }

    /// Back to the start of a body.
    pub fn reset(&mut self) {
        self.kinds[0] = TOP;
        self.depth = 0;
        self.before = Before::default();
    }

    /// Copies what the explainer needs, and not the slots above the limit.
    pub fn save_to(&self, saved: &mut State) {
        saved.kinds[..=DEPTH_MAX].copy_from_slice(&self.kinds[..=DEPTH_MAX]);
        saved.depth = self.depth;
        saved.before = self.before;
    }

    pub fn in_object(&self) -> bool {
        self.kinds[usize::from(self.depth)] == OBJECT
    }
}

/// One bit per token of a chunk.
pub(super) struct Marks {
    /// Tokens that start a record. One word of zeros follows the last, for reads across words.
    pub starts: [u64; BLOCK_COUNT + 1],
    /// Brackets and commas of top-level arrays.
    pub drops: [u64; BLOCK_COUNT + 1],
    /// Whether any bit is set.
    pub any: bool,
    pub start_count: usize,
    /// Whether each start is a `{`.
    pub all_objects: bool,
}

impl Marks {
    pub fn new() -> Self {
        Self {
            starts: [0; BLOCK_COUNT + 1],
            drops: [0; BLOCK_COUNT + 1],
            any: false,
            start_count: 0,
            all_objects: true,
        }
    }
}

/// Checks the tokens of `chunk`. False if there is an error.
#[inline(always)]
pub(super) fn check<B: Block>(
    block: B,
    chunk: &Chunk,
    state: &mut State,
    marks: &mut Marks,
) -> bool {
    let word_count = chunk.token_count.div_ceil(BLOCK_SIZE);
    let (words, _) = chunk.tokens.as_chunks::<BLOCK_SIZE>();
    let (mut bad, mut any, mut starts_other, mut start_count) = (0, 0, 0, 0);
    let mut before = state.before;
    let mut depth = state.depth;
    let mut depth_max = depth;
    for (index, tokens) in words[..word_count].iter().enumerate() {
        let count = (chunk.token_count - index * BLOCK_SIZE).min(BLOCK_SIZE);
        let valid = !0 >> (BLOCK_SIZE - count);
        let last = count - 1;

        let lanes = block.load(tokens);
        let string = block.equal(lanes, b'"') & valid;
        let colon = block.equal(lanes, b':') & valid;
        let comma = block.equal(lanes, b',') & valid;
        let brace_open = block.equal(lanes, b'{') & valid;
        let brace_close = block.equal(lanes, b'}') & valid;
        let bracket_open = block.equal(lanes, b'[') & valid;
        let bracket_close = block.equal(lanes, b']') & valid;
        let opener = brace_open | bracket_open;
        let closer = brace_close | bracket_close;
        let scalar = valid & !(colon | comma | opener | closer); // strings included
        let value = scalar | opener;

        let after = |mask: u64, before: &mut u64| {
            let shifted = mask << 1 | *before;
            *before = mask >> last & 1;
            shifted
        };
        let after_brace = after(brace_open, &mut before.brace);
        let after_bracket = after(bracket_open, &mut before.bracket);
        let after_comma = after(comma, &mut before.comma);
        let after_colon = after(colon, &mut before.colon);
        let key = string & (after_brace | after_comma);
        let after_key = after(key, &mut before.key);
        let after_scalar = after(scalar, &mut before.scalar);
        let after_closer = after(closer, &mut before.closer);

        bad |= colon & !after_key;
        bad |= valid & (after_comma | after_colon) & !value;
        bad |= valid & after_bracket & !(value | bracket_close);
        bad |= valid & after_brace & !(string | brace_close);
        bad |= value & after_scalar;
        let value_twice = value & after_closer;
        // By kind. What does not depend on the container is above.
        let in_array = colon | brace_close | value_twice;
        let in_object =
            (after_comma & !string | after_key & !colon | bracket_close | value_twice) & valid;
        let at_top = colon | comma | closer | scalar;
        let bad_in = [in_array, in_object, in_array, at_top];
        let starts_in = [0, 0, value, brace_open];
        let drops_in = [0, 0, comma | bracket_close, bracket_open];

        let (mut starts, mut drops) = (0, 0);
        let mut seen = 0;
        let mut rest = opener | closer;
        while rest != 0 {
            let up_to = rest ^ (rest - 1);
            let since = up_to & !seen;
            seen = up_to;
            let kind = state.kinds[usize::from(depth)];
            bad |= bad_in[usize::from(kind & 3)] & since;
            if kind >= TOP_ARRAY {
                starts |= starts_in[usize::from(kind & 3)] & since;
                drops |= drops_in[usize::from(kind & 3)] & since;
            }

            let at = rest.trailing_zeros();
            let object = (brace_open >> at & 1) as u8;
            let top = u8::from(depth == 0);
            state.kinds[usize::from(depth.wrapping_add(1))] =
                object | (TOP_ARRAY * (top & !object));
            depth = depth
                .wrapping_add(((opener >> at & 1) as u8) << 1)
                .wrapping_sub(1);
            depth_max = depth_max.max(depth);
            rest &= rest - 1;
        }
        let kind = usize::from(state.kinds[usize::from(depth)] & 3);
        bad |= bad_in[kind] & !seen;
        starts |= starts_in[kind] & !seen;
        drops |= drops_in[kind] & !seen;

        marks.starts[index] = starts;
        marks.drops[index] = drops;
        any |= starts | drops;
        start_count += starts.count_ones() as usize;
        starts_other |= starts & !brace_open;
        if bad != 0 || usize::from(depth_max) > DEPTH_MAX {
            return false;
        }
    }
    marks.starts[word_count] = 0;
    marks.drops[word_count] = 0;
    marks.any = any != 0;
    marks.start_count += start_count;
    marks.all_objects &= starts_other == 0;
    state.before = before;
    state.depth = depth;
    true
}
