//! The explainer: says which byte is wrong, and why, once the fast steps have said that something is.
//!
//! Runs only for a body that will be refused, from the start of the chunk that failed: a byte at a time, with what was
//! known there ([`Resume`]), over bytes as sent. Never allocates; linear, and ends at the first wrong byte.
//!
//! Invariant: the offset reported is that of the first byte after which no valid body is possible
//! (for UTF-8, of the first byte of the ill-formed sequence; the size of the body if it ends too early).
//!
//! Not here: speed.

use super::grammar::{ARRAY, OBJECT, State};
use super::{Carry, DEPTH_MAX, JsonError, codes, scalar};

/// What is known at the start of a chunk.
pub(super) struct Resume {
    pub offset: usize,
    pub newline_count: usize,
    pub carry: Carry,
    pub state: State,
    /// Whether there was a token before.
    pub any: bool,
}

/// What may come next, outside strings and scalars.
#[derive(Clone, Copy, PartialEq)]
enum Expect {
    Top,
    KeyOrEnd,
    Key,
    Colon,
    ValueOrEnd,
    Value,
    CommaOrEnd,
}

type Wrong = (usize, &'static str, &'static str);

/// The error in `body`, which is as sent from `resume.offset` on. None if there is none.
#[cold]
#[inline(never)]
pub(super) fn explain(body: &[u8], resume: &mut Resume) -> Option<JsonError> {
    let (offset, code, detail) = walk(body, resume).err()?;
    // Line feeds inside strings are errors themselves, so each one before the error is white space.
    let lines = body[resume.offset..offset]
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count();
    Some(JsonError {
        code,
        offset,
        line: 1 + resume.newline_count + lines,
        detail,
    })
}

fn expected(resume: &Resume) -> Expect {
    let State { before, depth, .. } = resume.state;
    let object = resume.state.in_object();
    match () {
        () if depth == 0 => Expect::Top,
        () if before.brace == 1 => Expect::KeyOrEnd,
        () if before.bracket == 1 => Expect::ValueOrEnd,
        () if before.comma == 1 && object => Expect::Key,
        () if before.comma == 1 || before.colon == 1 => Expect::Value,
        () if before.key == 1 && object => Expect::Colon,
        () => Expect::CommaOrEnd,
    }
}

fn walk(body: &[u8], resume: &mut Resume) -> Result<(), Wrong> {
    let mut at = resume.offset;
    let mut expect = expected(resume);
    let mut any = resume.any;
    if resume.carry.in_string != 0 {
        // A chunk may start inside a code point, which was checked with the chunk before.
        at = at.max(resume.carry.utf8_offset);
        at = string_end(body, at, resume.carry.escaped != 0)?;
    } else if resume.carry.scalar != 0 {
        // Scanned in full where it started.
        at += body[at..]
            .iter()
            .take_while(|&&byte| !scalar::ends_scalar(byte))
            .count();
    }
    if resume.offset == 0 && body.starts_with(b"\xEF\xBB\xBF") {
        return Err((0, codes::SYNTAX, "a byte order mark before the JSON text"));
    }
    let state = &mut resume.state;
    while let Some(&byte) = body.get(at) {
        if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
            at += 1;
            continue;
        }
        any = true;
        let value_may_come = matches!(expect, Expect::Value | Expect::ValueOrEnd);
        let kind = state.kinds[usize::from(state.depth)];
        match byte {
            b'{' | b'[' if value_may_come || expect == Expect::Top => {
                if usize::from(state.depth) == DEPTH_MAX {
                    return Err((
                        at,
                        codes::DEPTH,
                        "more containers inside each other than allowed",
                    ));
                }
                state.depth += 1;
                let object = byte == b'{';
                state.kinds[usize::from(state.depth)] = if object { OBJECT } else { ARRAY };
                expect = if object {
                    Expect::KeyOrEnd
                } else {
                    Expect::ValueOrEnd
                };
                at += 1;
            }
            b'}' | b']'
                if (expect == Expect::CommaOrEnd && (kind == OBJECT) == (byte == b'}'))
                    || (expect == Expect::KeyOrEnd && byte == b'}')
                    || (expect == Expect::ValueOrEnd && byte == b']') =>
            {
                state.depth -= 1;
                expect = if state.depth == 0 {
                    Expect::Top
                } else {
                    Expect::CommaOrEnd
                };
                at += 1;
            }
            b',' if expect == Expect::CommaOrEnd => {
                expect = if kind == OBJECT {
                    Expect::Key
                } else {
                    Expect::Value
                };
                at += 1;
            }
            b':' if expect == Expect::Colon => {
                expect = Expect::Value;
                at += 1;
            }
            b'"' if value_may_come || matches!(expect, Expect::Key | Expect::KeyOrEnd) => {
                at = string_end(body, at + 1, false)?;
                expect = if value_may_come {
                    Expect::CommaOrEnd
                } else {
                    Expect::Colon
                };
            }
            b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n' if expect == Expect::Top => {
                return Err((
                    at,
                    codes::SCALAR,
                    "a value at the top that is neither an object nor an array",
                ));
            }
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' if value_may_come => {
                at = scalar::scan(body, at).map_err(|wrong| {
                    if wrong == body.len() {
                        truncated(body)
                    } else {
                        (wrong, codes::SYNTAX, "not a number, true, false or null")
                    }
                })?;
                expect = Expect::CommaOrEnd;
            }
            _ => {
                let detail = match expect {
                    Expect::Top => "expected an object, an array or the end of the body",
                    Expect::KeyOrEnd => "expected a key or `}`",
                    Expect::Key => "expected a key",
                    Expect::Colon => "expected `:`",
                    Expect::ValueOrEnd => "expected a value or `]`",
                    Expect::Value => "expected a value",
                    Expect::CommaOrEnd if kind == OBJECT => "expected `,` or `}`",
                    Expect::CommaOrEnd => "expected `,` or `]`",
                };
                return Err((at, codes::SYNTAX, detail));
            }
        }
    }
    match expect {
        Expect::Top if any => Ok(()),
        Expect::Top => Err((body.len(), codes::EMPTY, "no value in the body")),
        _ => Err(truncated(body)),
    }
}

fn truncated(body: &[u8]) -> Wrong {
    (body.len(), codes::TRUNCATED, "the body ends inside a value")
}

/// The offset after the closing quote of the string whose content is at `at`.
fn string_end(body: &[u8], mut at: usize, mut escaped: bool) -> Result<usize, Wrong> {
    loop {
        let Some(&byte) = body.get(at) else {
            return Err(truncated(body));
        };
        if escaped {
            escaped = false;
            match byte {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                b'u' => {
                    for digit in at + 1..at + 5 {
                        match body.get(digit) {
                            None => return Err(truncated(body)),
                            Some(byte) if byte.is_ascii_hexdigit() => {}
                            Some(_) => {
                                return Err((digit, codes::SYNTAX, "not a hexadecimal digit"));
                            }
                        }
                    }
                }
                _ => return Err((at, codes::SYNTAX, "not an escape")),
            }
            at += 1;
            continue;
        }
        at += match byte {
            b'"' => return Ok(at + 1),
            b'\\' => {
                escaped = true;
                1
            }
            0..0x20 => return Err((at, codes::SYNTAX, "a control character inside a string")),
            0x80.. => {
                let sequence = &body[at..body.len().min(at + 4)];
                match std::str::from_utf8(sequence) {
                    Ok(text) => text.chars().next().map_or(1, char::len_utf8),
                    Err(error) if error.valid_up_to() > 0 => byte.leading_ones() as usize,
                    Err(error)
                        if error.error_len().is_none() && at + sequence.len() == body.len() =>
                    {
                        return Err(truncated(body));
                    }
                    Err(_) => return Err((at, codes::UTF8, "not UTF-8")),
                }
            }
            _ => 1,
        };
    }
}
