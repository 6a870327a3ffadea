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
