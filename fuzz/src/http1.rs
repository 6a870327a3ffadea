//! The head parser and the chunked decoder: what must hold for any bytes, cut anywhere.

use weir::error::Reject;
use weir::http::chunked::Chunked;
use weir::http::h1::{self, Framing, Method};
use weir::limits::{CHUNK_EXTENSION_SIZE_MAX, CHUNK_EXTENSIONS_SIZE_MAX, TRAILER_SIZE_MAX};

/// A head, and what follows it as a chunked body; the whole input as one, too.
pub fn check(bytes: &[u8]) {
    chunked(bytes);
    let Ok(Some(head)) = h1::parse(bytes) else {
        return;
    };
    assert!(head.size <= bytes.len());
    assert!(bytes[..head.size].ends_with(b"\r\n\r\n"));
    assert!(head.path.end <= head.size);
    assert!(head.method != Method::Store || bytes[head.path.start] == b'/');
    assert!(!bytes[head.path.clone()].contains(&b'?'));
    // What is complete was incomplete at every point before, and nothing behind it matters.
    for cut in cuts(bytes).filter(|cut| *cut < head.size) {
        assert_eq!(h1::parse(&bytes[..cut]), Ok(None), "cut at {cut}");
    }
    assert_eq!(h1::parse(&bytes[..head.size]), Ok(Some(head.clone())));
    fields(&bytes[..head.size]);
    if head.framing == Framing::Chunked {
        chunked(&bytes[head.size..]);
    }
}

/// Every field is found by its name, if it is the only one of that name.
fn fields(head: &[u8]) {
    let lines: Vec<(String, &[u8])> = head
        .split(|byte| *byte == b'\n')
        .skip(1)
        .filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let name = std::str::from_utf8(&line[..colon]).ok()?;
            Some((name.to_ascii_lowercase(), line[colon + 1..].trim_ascii()))
        })
        .collect();
    for (name, value) in &lines {
        let count = lines.iter().filter(|(other, _)| other == name).count();
        match h1::field(head, name) {
            Ok(found) => assert_eq!((found, count), (Some(*value), 1), "{name}"),
            Err(_) => assert!(count > 1, "{name}"),
        }
    }
}

/// The decoder fed at once, in pieces, and its naive twin agree.
fn chunked(wire: &[u8]) {
    let expected = naive(wire);
    for pieces in [
        vec![],
        cuts(wire).collect(),
        (0..wire.len().min(300)).collect(),
    ] {
        let actual = in_pieces(wire, &pieces);
        assert_eq!(
            actual.map_err(|_| Malformed),
            expected,
            "{:?} cut at {pieces:?}",
            wire.escape_ascii()
        );
    }
}

/// A few places that depend on the input alone, in ascending order.
pub(crate) fn cuts(bytes: &[u8]) -> impl Iterator<Item = usize> + use<> {
    let size = bytes.len();
    let seed = bytes.iter().fold(size, |seed, byte| {
        seed.wrapping_mul(31) + usize::from(*byte)
    });
    let stride = 1 + seed % 40;
    (seed % stride..size).step_by(stride)
}

/// The decoded body and what follows it; `None` while the end has not come.
pub(crate) type Decoded = Option<(Vec<u8>, Vec<u8>)>;

fn in_pieces(wire: &[u8], cuts: &[usize]) -> Result<Decoded, Reject> {
    const HEAD: usize = 10;
    let mut bytes = vec![0xA5; HEAD + wire.len()];
    let mut chunked = Chunked::new(HEAD);
    let mut received = HEAD;
    let mut sent = 0;
    for cut in cuts.iter().copied().chain([wire.len()]) {
        bytes[received..received + cut - sent].copy_from_slice(&wire[sent..cut]);
        received += cut - sent;
        sent = cut;
        if chunked.decode(&mut bytes, received)? {
            assert_eq!(bytes[..HEAD], [0xA5; HEAD], "the head was written to");
            let mut rest = bytes[chunked.examined..received].to_vec();
            rest.extend_from_slice(&wire[sent..]);
            return Ok(Some((bytes[HEAD..chunked.decoded].to_vec(), rest)));
        }
        received = chunked.close_gap(&mut bytes, received);
    }
    Ok(None)
}

#[derive(Debug, PartialEq)]
pub(crate) struct Malformed;

/// RFC 9112 §7.1, read slowly and with the whole input at hand.
pub(crate) fn naive(wire: &[u8]) -> Result<Decoded, Malformed> {
    let mut rest = wire;
    let mut body = Vec::new();
    let mut extensions_left = CHUNK_EXTENSIONS_SIZE_MAX;
    loop {
        let Some(line) = take_line(&mut rest, 16 + CHUNK_EXTENSION_SIZE_MAX)? else {
            return Ok(None);
        };
        let (size, extension_size) = chunk_size(line)?;
        extensions_left = extensions_left
            .checked_sub(extension_size)
            .ok_or(Malformed)?;
        if size == 0 {
            break;
        }
        if (rest.len() as u64) < size {
            return Ok(None);
        }
        let (data, after) = rest.split_at(size as usize);
        body.extend_from_slice(data);
        rest = match after {
            [b'\r', b'\n', next @ ..] => next,
            [] | [b'\r'] => return Ok(None),
            _ => return Err(Malformed),
        };
    }
    let mut left = TRAILER_SIZE_MAX;
    while let Some(line) = take_line(&mut rest, left)? {
        if line.is_empty() {
            return Ok(Some((body, rest.to_vec())));
        }
        let colon = line
            .iter()
            .position(|byte| *byte == b':')
            .ok_or(Malformed)?;
        if colon == 0 || !line[..colon].iter().all(is_token) || !line[colon..].iter().all(is_text) {
            return Err(Malformed);
        }
        let name = String::from_utf8_lossy(&line[..colon]).to_lowercase();
        if name.starts_with("x-hub-") || NOT_IN_TRAILERS.split(' ').any(|refused| refused == name) {
            return Err(Malformed);
        }
        left = left.saturating_sub(line.len() + 2);
    }
    Ok(None)
}

const NOT_IN_TRAILERS: &str = "authorization connection content-encoding content-length content-range content-type \
                               cookie expect host proxy-authorization te trailer transfer-encoding upgrade";

fn is_token(byte: &u8) -> bool {
    byte.is_ascii_graphic() && !b"\"(),/:;<=>?@[\\]{}".contains(byte)
}

fn is_text(byte: &u8) -> bool {
    *byte == b'\t' || (*byte >= b' ' && *byte != 127)
}

/// The size, and how long the extensions are.
fn chunk_size(line: &[u8]) -> Result<(u64, usize), Malformed> {
    let digits = match line.iter().position(|byte| *byte == b';') {
        Some(at) => &line[..at],
        None => line,
    };
    let extension = &line[digits.len()..];
    if extension.len() > CHUNK_EXTENSION_SIZE_MAX || !extension.is_empty() && !extensions(extension)
    {
        return Err(Malformed);
    }
    let digits = std::str::from_utf8(digits).map_err(|_| Malformed)?;
    if digits.is_empty()
        || digits.len() > 16
        || !digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        return Err(Malformed);
    }
    let size = u64::from_str_radix(digits, 16).map_err(|_| Malformed)?;
    Ok((size, extension.len()))
}

/// RFC 9112 §7.1.1, as a state machine over single bytes.
fn extensions(text: &[u8]) -> bool {
    #[derive(PartialEq)]
    enum At {
        Semicolon,
        NameStart,
        Name,
        ValueStart,
        Value,
        Quoted,
        Escaped,
    }
    let mut at = At::Semicolon;
    for byte in text {
        at = match (at, byte) {
            (At::Semicolon | At::Name | At::Value, b';') => At::NameStart,
            (At::Name, b'=') => At::ValueStart,
            (At::NameStart | At::Name, byte) if is_token(byte) => At::Name,
            (At::ValueStart, b'"') => At::Quoted,
            (At::ValueStart | At::Value, byte) if is_token(byte) => At::Value,
            (At::Quoted, b'"') => At::Semicolon,
            (At::Quoted, b'\\') => At::Escaped,
            (At::Quoted | At::Escaped, byte) if is_text(byte) => At::Quoted,
            _ => return false,
        };
    }
    matches!(at, At::Semicolon | At::Name | At::Value)
}

fn take_line<'a>(rest: &mut &'a [u8], size_max: usize) -> Result<Option<&'a [u8]>, Malformed> {
    let bytes: &'a [u8] = rest;
    match bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n')) {
        None if bytes.len() > size_max => Err(Malformed),
        None => Ok(None),
        Some(at) if at > size_max || bytes[at] == b'\n' => Err(Malformed),
        Some(at) => match bytes.get(at + 1) {
            None => Ok(None),
            Some(b'\n') => {
                *rest = &bytes[at + 2..];
                Ok(Some(&bytes[..at]))
            }
            Some(_) => Err(Malformed),
        },
    }
}
