//! Step 1, classify: where strings, white space and tokens are in a chunk, and whether strings and scalars are valid.
//!
//! Comes first for each chunk, on bytes as sent; the grammar step reads the tokens it lists, the squeeze step the masks.
//! Keeps everything in [`Chunk`], allocated once per checker.
//!
//! Invariant: an error is found in the chunk that holds its first wrong byte or in an earlier one, never later
//! (whatever needs more bytes than the chunk has reads ahead, as nothing there has moved yet).
//! That is what lets the explainer start at the chunk.
//!
//! Not here: which error it is, and where. The answer is yes or no; [`super::explain`] does the rest.
//!
//! ```text
//! for each block of 64 bytes:                                                             (classify)
//!     a mask per class of bytes: quotes, operators, white space, ...
//! for each block with a backslash:                                                        (escapes)
//!     escaped   = bytes after an odd number of backslashes          validate them; such quotes are no quotes
//! for each block:                                                                         (masks)
//!     in_string = prefix xor of the quotes
//!     keep      = in_string or not white space                      control characters in it are errors
//!     scalar    = kept, not in a string, not an operator
//!     tokens    = operators, opening quotes, first bytes of scalars
//! for each block in which a scalar starts: validate it                                    (scalars_are_valid)
//! validate UTF-8 if a byte had its top bit set
//! for each block: append the bytes at `tokens` to the chunk's token bytes                 (append)
//! ```
//!
//! Departures, made for speed:
//! 1. Several loops over the chunk and not one: each keeps its state and constants in registers, and what only some
//!    blocks need is done for those in a row. As one loop, it spilled its state to the stack for every block.
//! 2. Chunks without a backslash (nearly all) skip the search for escapes; of blocks with one, the frequent escapes
//!    are checked as a mask and only `\u`, `\b`, `\f` one by one.
//! 3. Numbers are checked for a whole block at once, with an addition for each of their parts; literals by one
//!    comparison of a word. Only a scalar that crosses into the next block is read byte by byte.
//! 4. Tokens are listed as *bytes*, not as positions. The grammar needs no positions, and the few that the squeeze
//!    step needs (record starts) are found back through the token mask.
//! 5. UTF-8 is checked per chunk, over the chunk and the continuation bytes that follow it.

use super::block::{BLOCK_SIZE, Block, Classes};
use super::{CHUNK_SIZE, scalar};

/// Blocks in a chunk.
pub(super) const BLOCK_COUNT: usize = CHUNK_SIZE / BLOCK_SIZE;

const _: () = assert!(BLOCK_COUNT <= 64, "a bit per block must fit a word");

/// What is known of one chunk; overwritten by the next.
pub(super) struct Chunk {
    /// Per block: what its bytes are.
    classes: [Classes; BLOCK_COUNT],
    /// Per block, after the one before the chunk: bytes of scalars outside strings.
    scalars: [u64; BLOCK_COUNT + 1],
    /// One bit per block: whether a scalar starts in it.
    scalar_blocks: u64,
    /// Per block: bytes that stay.
    pub keeps: [u64; BLOCK_COUNT],
    /// Per block: bytes that are tokens.
    pub token_masks: [u64; BLOCK_COUNT],
    /// The first byte of each token, without gaps; a block may be written past the end of the last.
    pub tokens: [u8; CHUNK_SIZE + BLOCK_SIZE],
    pub token_count: usize,
    /// Line feeds that are white space (any other is an error).
    pub newline_count: usize,
}

impl Chunk {
    pub fn new() -> Self {
        Self {
            classes: [Classes::default(); BLOCK_COUNT],
            scalars: [0; BLOCK_COUNT + 1],
            scalar_blocks: 0,
            keeps: [0; BLOCK_COUNT],
            token_masks: [0; BLOCK_COUNT],
            tokens: [0; CHUNK_SIZE + BLOCK_SIZE],
            token_count: 0,
            newline_count: 0,
        }
    }
}

/// What the first byte of a chunk inherits.
#[derive(Clone, Copy, Default)]
pub(super) struct Carry {
    /// 1 if a backslash before it escapes it.
    pub escaped: u64,
    /// All ones if it is inside a string.
    pub in_string: u64,
    /// 1 if the byte before it belongs to a scalar outside strings.
    pub scalar: u64,
    /// UTF-8 is checked up to here (an offset in the body; may lie a few bytes beyond the chunk's start).
    pub utf8_offset: usize,
}

/// Classifies `body[from..to]`, at most a chunk; `to` is the end of the body or a whole number of blocks after `from`.
/// False if there is an error.
#[inline(always)]
pub(super) fn classify<B: Block>(
    block: B,
    body: &[u8],
    from: usize,
    to: usize,
    carry: &mut Carry,
    chunk: &mut Chunk,
) -> bool {
    let (blocks, rest) = body[from..to].as_chunks::<BLOCK_SIZE>();
    let mut last = [b' '; BLOCK_SIZE];
    last[..rest.len()].copy_from_slice(rest);
    let count = blocks.len() + usize::from(!rest.is_empty());

    let (mut high, mut backslash) = (0, 0);
    for (bytes, classes) in blocks.iter().zip(&mut chunk.classes) {
        block.classify(block.load(bytes), classes);
        high |= classes.high;
        backslash |= classes.backslash;
    }
    if let Some(classes) = chunk.classes[blocks.len()..count].first_mut() {
        block.classify(block.load(&last), classes);
        high |= classes.high;
        backslash |= classes.backslash;
    }
    let mut valid = true;
    if backslash | carry.escaped != 0 {
        valid &= escapes(block, body, from, count, carry, chunk);
    }
    valid &= masks(block, count, carry, chunk);
    let mut scalar_blocks = chunk.scalar_blocks;
    while scalar_blocks != 0 {
        let index = scalar_blocks.trailing_zeros() as usize;
        valid &= scalars_are_valid(block, body, from, index, chunk);
        scalar_blocks &= scalar_blocks - 1;
    }
    if high != 0 {
        let mut end = to;
        while end < to + 3 && body.get(end).is_some_and(|byte| byte & 0xC0 == 0x80) {
            end += 1;
        }
        let start = from.max(carry.utf8_offset);
        carry.utf8_offset = end;
        valid &= simdutf8::basic::from_utf8(&body[start..end]).is_ok();
    }

    let mut token_count = 0;
    for (bytes, &mask) in blocks.iter().zip(&chunk.token_masks) {
        token_count += append(block, bytes, mask, &mut chunk.tokens[token_count..]);
    }
    if let Some(&mask) = chunk.token_masks[blocks.len()..count].first() {
        token_count += append(block, &last, mask, &mut chunk.tokens[token_count..]);
    }
    chunk.token_count = token_count;
    valid
}

/// Writes the bytes at `mask` to the front of `tokens`; returns how many they are.
// A function, because a closure that is not inlined is compiled without the instructions of `B`.
#[inline(always)]
fn append<B: Block>(block: B, bytes: &[u8; BLOCK_SIZE], mask: u64, tokens: &mut [u8]) -> usize {
    if let Some(to) = tokens.first_chunk_mut() {
        block.squeeze(block.load(bytes), mask, to);
    }
    mask.count_ones() as usize
}

/// Takes the escaped quotes out of the chunk's classes. False if something is escaped that may not be.
#[inline(always)]
fn escapes<B: Block>(
    block: B,
    body: &[u8],
    from: usize,
    count: usize,
    carry: &mut Carry,
    chunk: &mut Chunk,
) -> bool {
    let mut valid = true;
    for (index, classes) in chunk.classes[..count].iter_mut().enumerate() {
        if classes.backslash | carry.escaped == 0 {
            continue;
        }
        let offset = from + index * BLOCK_SIZE;
        let escaped = escaped(classes.backslash, &mut carry.escaped);
        let mut frequent = classes.quote | classes.backslash;
        classes.quote &= !escaped;
        if let Some(bytes) = body[offset..].first_chunk() {
            let lanes = block.load(bytes);
            for byte in *b"n/rt" {
                frequent |= block.equal(lanes, byte);
            }
        }
        valid &= each(escaped & !frequent, |at| is_escape(body, offset + at));
    }
    valid
}

/// Where the strings of the chunk are, and all that follows from it for its other bytes.
/// False if there is a control character in a string, or one outside that is not white space.
#[inline(always)]
fn masks<B: Block>(block: B, count: usize, carry: &mut Carry, chunk: &mut Chunk) -> bool {
    let (mut bad, mut newline_count, mut scalar_blocks) = (0, 0, 0);
    let mut in_string_before = carry.in_string;
    let mut scalar_before = carry.scalar << 63;
    chunk.scalars[0] = scalar_before;
    for index in 0..count.min(BLOCK_COUNT) {
        let classes = &chunk.classes[index];
        // From each opening quote to the byte before the closing one.
        let in_string = block.prefix_xor(classes.quote) ^ in_string_before;
        in_string_before = (in_string as i64 >> 63) as u64;
        let string = in_string | classes.quote;
        let keep = string | !classes.white;
        // RFC 8259 §7: control characters in strings must be escaped; outside, those that are not white space are
        // nothing.
        bad |= classes.control & keep;
        newline_count += classes.newline.count_ones() as usize;

        let scalar = !(classes.op | classes.white | string);
        let scalar_start = scalar & !(scalar << 1 | scalar_before >> 63);
        scalar_before = scalar;
        // One bit per block, because a branch here could not be predicted.
        scalar_blocks |= u64::from(scalar_start != 0) << index;
        let tokens = classes.op & !string | classes.quote & in_string | scalar_start;
        chunk.keeps[index] = keep;
        chunk.scalars[index + 1] = scalar;
        chunk.token_masks[index] = tokens;
    }
    carry.in_string = in_string_before;
    carry.scalar = scalar_before >> 63;
    chunk.newline_count = newline_count;
    chunk.scalar_blocks = scalar_blocks;
    bad == 0
}

/// Whether the scalars that start in a block are valid, wherever they end.
#[inline(always)]
fn scalars_are_valid<B: Block>(
    block: B,
    body: &[u8],
    from: usize,
    index: usize,
    chunk: &Chunk,
) -> bool {
    let offset = from + index * BLOCK_SIZE;
    let (before, scalar) = (chunk.scalars[index], chunk.scalars[index + 1]);
    let mut start = scalar & !(scalar << 1 | before >> 63);
    let Some(bytes) = body[offset..].first_chunk() else {
        return each(start, |at| scalar::scan(body, offset + at).is_ok());
    };
    let lanes = block.load(bytes);
    let digit = chunk.classes[index].digit;
    let mut valid = true;
    if scalar >> 63 != 0 {
        // The last one may go on in the next block.
        let last = 63 - start.leading_zeros();
        start ^= 1 << last;
        valid &= scalar::scan(body, offset + last as usize).is_ok();
    }
    let minus = start & block.equal(lanes, b'-');
    let literal = start & !(digit | minus);
    // RFC 8259 §6. A number is a chain of runs of digits: integer, fraction, exponent. Adding its first bit to a run
    // leaves a single bit just after it, and `digit` stays as it was elsewhere; no run here reaches the block's end.
    // `end` is the byte after what is a number so far: if it belongs to the scalar, the next part must start there.
    let first = start & digit | minus << 1;
    let zero = first & block.equal(lanes, b'0');
    let after = |first: u64| first.wrapping_add(digit) & !digit;
    let mut bad = first & !digit;
    let mut end = after(first & !zero) | zero << 1;
    if end & scalar != 0 {
        let dot = end & block.equal(lanes, b'.');
        let first = dot << 1;
        bad |= first & !digit;
        end ^= dot | after(first);
        let exponent = end & (block.equal(lanes, b'e') | block.equal(lanes, b'E'));
        let sign = exponent << 1 & (block.equal(lanes, b'+') | block.equal(lanes, b'-'));
        let first = exponent << 1 & !sign | sign << 1;
        bad |= first & !digit;
        end ^= exponent | after(first);
        bad |= end & scalar;
    }
    valid & (bad == 0) & each(literal, |at| scalar::is_literal(body, offset + at))
}

/// Whether `valid` says yes to every set bit of `mask`.
#[inline(always)]
fn each(mut mask: u64, valid: impl Fn(usize) -> bool) -> bool {
    let mut all = true;
    while mask != 0 {
        all &= valid(mask.trailing_zeros() as usize);
        mask &= mask - 1;
    }
    all
}

/// The bytes that a backslash escapes, by the subtraction that finds the even and odd runs of backslashes
/// (the method is simdjson's); `carry` is whether the first byte is, and becomes whether the next block's first is.
#[inline(always)]
fn escaped(backslash: u64, carry: &mut u64) -> u64 {
    const ODD: u64 = 0xAAAA_AAAA_AAAA_AAAA;
    let may_escape = backslash & !*carry;
    let runs = (may_escape << 1 | ODD).wrapping_sub(may_escape) ^ ODD;
    let escaped = runs ^ (backslash | *carry);
    *carry = (runs & backslash) >> 63;
    escaped
}

/// RFC 8259 §7, for what the mask did not accept. `at` is after the backslash.
fn is_escape(body: &[u8], at: usize) -> bool {
    match body.get(at) {
        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => true,
        Some(b'u') => body
            .get(at + 1..at + 5)
            .is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)),
        _ => false,
    }
}
