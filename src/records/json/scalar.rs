//! Scalars outside strings: `true`, `false`, `null` and numbers, from their first byte to the byte after them.
//!
//! Called by the classify step, which wants a yes, and by the explainer, which wants the byte that is wrong.
//! Reads ahead in the body as sent, so a scalar never has to be resumed. Linear, no allocation.
//!
//! Not here: values. A number stays the bytes it came as.

/// Whether `byte` may follow a scalar: white space, an operator or a quote.
/// The last is never right either, but then it is the grammar's error and not the scalar's.
pub(super) const fn ends_scalar(byte: u8) -> bool {
    matches!(
        byte,
        b' ' | b'\t' | b'\n' | b'\r' | b'{' | b'}' | b'[' | b']' | b':' | b',' | b'"'
    )
}

/// The offset after the scalar at `at`, or the offset of the first byte that is wrong.
/// The latter is `body.len()` if the body ends too early.
pub(super) fn scan(body: &[u8], at: usize) -> Result<usize, usize> {
    let end = match body.get(at) {
        Some(b't') => literal(body, at, b"true")?,
        Some(b'f') => literal(body, at, b"false")?,
        Some(b'n') => literal(body, at, b"null")?,
        _ => number(body, at)?,
    };
    match body.get(end) {
        Some(&byte) if !ends_scalar(byte) => Err(end),
        _ => Ok(end),
    }
}

/// Whether a literal, and no other scalar, is at `at`. The same answer as [`scan`], without a branch on which it is.
#[inline(always)]
pub(super) fn is_literal(body: &[u8], at: usize) -> bool {
    // Bits 3 and 4 of the first byte tell the three apart; no byte is the fourth, whose mask is zero.
    const WORDS: [(u64, u64, u32); 4] = [
        (u64::from_le_bytes(*b"false\0\0\0"), 0xFF_FFFF_FFFF, 40),
        (u64::from_le_bytes(*b"null\0\0\0\0"), 0xFFFF_FFFF, 32),
        (u64::from_le_bytes(*b"true\0\0\0\0"), 0xFFFF_FFFF, 32),
        (1, 0, 0),
    ];
    let Some(bytes) = body[at..].first_chunk() else {
        return scan(body, at).is_ok();
    };
    let bytes = u64::from_le_bytes(*bytes);
    let (word, mask, end) = WORDS[bytes as usize >> 3 & 3];
    (bytes & mask == word) & ENDS_SCALAR[(bytes >> end) as usize & 0xFF]
}

/// [`ends_scalar`] of each byte.
static ENDS_SCALAR: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = ends_scalar(byte as u8);
        byte += 1;
    }
    table
};

#[inline(always)]
fn literal(body: &[u8], at: usize, word: &[u8]) -> Result<usize, usize> {
    if body[at..].starts_with(word) {
        return Ok(at + word.len());
    }
    let same = body[at..]
        .iter()
        .zip(word)
        .take_while(|(byte, wanted)| byte == wanted)
        .count();
    Err(at + same)
}

/// RFC 8259 §6: `[ minus ] int [ frac ] [ exp ]`.
#[inline(always)]
fn number(body: &[u8], mut at: usize) -> Result<usize, usize> {
    if body.get(at) == Some(&b'-') {
        at += 1;
    }
    at = match body.get(at) {
        Some(b'0') => at + 1,
        _ => digits(body, at)?,
    };
    if body.get(at) == Some(&b'.') {
        at = digits(body, at + 1)?;
    }
    if let Some(b'e' | b'E') = body.get(at) {
        at += 1;
        if let Some(b'+' | b'-') = body.get(at) {
            at += 1;
        }
        at = digits(body, at)?;
    }
    Ok(at)
}

/// One digit or more.
#[inline(always)]
fn digits(body: &[u8], at: usize) -> Result<usize, usize> {
    let mut end = at;
    while let Some(b'0'..=b'9') = body.get(end) {
        end += 1;
    }
    if end == at { Err(at) } else { Ok(end) }
}
