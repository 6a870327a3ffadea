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
//! for each block of 64 bytes:
//!     escaped   = bytes after an odd number of backslashes          validate them
//!     in_string = prefix xor of the unescaped quotes
//!     keep      = in_string or not white space                      control characters in it are errors
//!     scalar    = kept, not in a string, not an operator
//!     tokens    = operators, opening quotes, first bytes of scalars
//!     validate the scalars that start here
//!     append the bytes at `tokens` to the chunk's token bytes
//! validate UTF-8 if a byte had its top bit set
//! ```
//!
//! Departures, made for speed:
//! 1. Blocks without a backslash (nearly all) skip the search for escapes; of those with one, the frequent escapes
//!    are checked as a mask and only `\u`, `\b`, `\f` one by one.
//! 2. Integers are checked for a whole block with one addition, literals by one comparison of a word; only blocks with
//!    other numbers, or with one that crosses into the next block, have their numbers read byte by byte.
//! 3. Tokens are listed as *bytes*, not as positions. The grammar needs no positions, and the few that the squeeze
//!    step needs (record starts) are found back through the token mask.
//! 4. UTF-8 is checked per chunk, over the chunk and the continuation bytes that follow it.

use super::block::{BLOCK_SIZE, Block};
use super::{CHUNK_SIZE, scalar};

/// Blocks in a chunk.
pub(super) const BLOCK_COUNT: usize = CHUNK_SIZE / BLOCK_SIZE;

/// What is known of one chunk; overwritten by the next.
pub(super) struct Chunk {
    /// Per block: bytes that stay.
    pub keeps: [u64; BLOCK_COUNT],
    /// Per block: bytes that are tokens.
    pub token_masks: [u64; BLOCK_COUNT],
    /// The first byte of each token, without gaps; a block may be written past the end of the last.
    pub tokens: [u8; CHUNK_SIZE + BLOCK_SIZE],
    pub token_count: usize,
    /// Whether no byte of a full block is dropped.
    pub all_kept: bool,
    /// Line feeds that are white space (any other is an error).
    pub newline_count: usize,
}

impl Chunk {
    pub fn new() -> Self {
        Self {
            keeps: [0; BLOCK_COUNT],
            token_masks: [0; BLOCK_COUNT],
            tokens: [0; CHUNK_SIZE + BLOCK_SIZE],
            token_count: 0,
            all_kept: true,
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

/// Sums over the blocks of a chunk.
struct Sums {
    /// Nonzero: something is wrong in this chunk or where it reads ahead.
    bad: u64,
    high: u64,
    kept: u64,
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
    chunk.token_count = 0;
    chunk.newline_count = 0;
    let mut sums = Sums {
        bad: 0,
        high: 0,
        kept: !0,
    };
    let (blocks, rest) = body[from..to].as_chunks::<BLOCK_SIZE>();
    for (index, bytes) in blocks.iter().enumerate() {
        one(block, body, from, index, bytes, carry, chunk, &mut sums);
    }
    if !rest.is_empty() {
        let mut bytes = [b' '; BLOCK_SIZE];
        bytes[..rest.len()].copy_from_slice(rest);
        one(
            block,
            body,
            from,
            blocks.len(),
            &bytes,
            carry,
            chunk,
            &mut sums,
        );
    }
    chunk.all_kept = sums.kept == !0;
    if sums.high != 0 {
        let mut end = to;
        while end < to + 3 && body.get(end).is_some_and(|byte| byte & 0xC0 == 0x80) {
            end += 1;
        }
        let start = from.max(carry.utf8_offset);
        carry.utf8_offset = end;
        sums.bad |= u64::from(simdutf8::basic::from_utf8(&body[start..end]).is_err());
    }
    sums.bad == 0
}

#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "the body of the loop, called twice and always inlined"
)]
fn one<B: Block>(
    block: B,
    body: &[u8],
    from: usize,
    index: usize,
    bytes: &[u8; BLOCK_SIZE],
    carry: &mut Carry,
    chunk: &mut Chunk,
    sums: &mut Sums,
) {
    let offset = from + index * BLOCK_SIZE;
    let lanes = block.load(bytes);
    let classes = block.classes(lanes);

    let mut quote = classes.quote;
    if classes.backslash | carry.escaped != 0 {
        let escaped = escaped(classes.backslash, &mut carry.escaped);
        quote &= !escaped;
        let mut frequent = classes.quote | classes.backslash;
        for byte in *b"n/rt" {
            frequent |= block.equal(lanes, byte);
        }
        let mut rest = escaped & !frequent;
        while rest != 0 {
            let at = offset + rest.trailing_zeros() as usize;
            sums.bad |= u64::from(!is_rare_escape(body, at));
            rest &= rest - 1;
        }
    }

    // From each opening quote to the byte before the closing one.
    let in_string = block.prefix_xor(quote) ^ carry.in_string;
    carry.in_string = (in_string as i64 >> 63) as u64;
    let string = in_string | quote;
    let keep = string | !classes.white;
    // RFC 8259 §7: control characters in strings must be escaped; outside, those that are not white space are nothing.
    sums.bad |= classes.control & keep;
    sums.high |= classes.high;
    sums.kept &= keep;
    chunk.newline_count += classes.newline.count_ones() as usize;

    let scalar = !(classes.op | classes.white | string);
    let scalar_start = scalar & !(scalar << 1 | carry.scalar);
    carry.scalar = scalar >> 63;
    if scalar_start != 0 {
        let digit = block.digits(lanes);
        let minus = scalar_start & block.equal(lanes, b'-');
        // Integers: after a minus or at the start, a lone `0`, or a run of digits that starts with another one.
        // Adding its first bit to such a run leaves a single bit just after it, which must not belong to a scalar.
        let first = scalar_start & digit | minus << 1;
        let zero = first & block.equal(lanes, b'0');
        let (sum, run_leaves_block) = (first & digit & !zero).overflowing_add(digit);
        let other = first & !digit
            | zero & (scalar >> 1 | 1 << 63)
            | sum & !digit & scalar
            | minus & 1 << 63;
        if other != 0 || run_leaves_block {
            let mut rest = scalar_start & (digit | minus);
            while rest != 0 {
                let at = offset + rest.trailing_zeros() as usize;
                sums.bad |= u64::from(scalar::scan(body, at).is_err());
                rest &= rest - 1;
            }
        }
        let mut rest = scalar_start & !(digit | minus);
        while rest != 0 {
            let at = offset + rest.trailing_zeros() as usize;
            sums.bad |= u64::from(!scalar::is_literal(body, at));
            rest &= rest - 1;
        }
    }

    let tokens = classes.op & !string | quote & in_string | scalar_start;
    chunk.keeps[index] = keep;
    chunk.token_masks[index] = tokens;
    if let Some(to) = chunk.tokens[chunk.token_count..].first_chunk_mut() {
        block.squeeze(lanes, tokens, to);
    }
    chunk.token_count += tokens.count_ones() as usize;
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

/// RFC 8259 §7, the escapes that the mask did not accept: `\b`, `\f`, `\uXXXX`. `at` is after the backslash.
fn is_rare_escape(body: &[u8], at: usize) -> bool {
    match body.get(at) {
        Some(b'b' | b'f') => true,
        Some(b'u') => body
            .get(at + 1..at + 5)
            .is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)),
        _ => false,
    }
}
