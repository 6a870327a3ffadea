//! The chunked transfer coding, decoded in place (RFC 9112 §7.1).
//!
//! Before it: [`crate::connection`] reads into the slab behind what was received.
//! After it: the body lies at the start of the decoded range, without a byte of framing.
//! Thread: any; pure. Allocates: never.
//! Invariant: `decoded ≤ examined ≤ received`; a decoder that refused stays refused.
//! Not here: the trailer fields' meaning; they are checked and dropped.
//!
//! ```text
//! received so far:   | decoded body |..gap..| not examined |
//!                    0              decoded  examined       received
//! after a step, the caller may close the gap: what is not examined moves down to `decoded`.
//! ```

use super::syntax::{is_field_byte, is_token, is_token_byte};
use crate::error::Reject;
use crate::limits::{CHUNK_EXTENSION_SIZE_MAX, CHUNK_EXTENSIONS_SIZE_MAX, TRAILER_SIZE_MAX};

/// Named by what it expects next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Size,
    Data { remaining: u64 },
    DataEnd,
    Trailer { size: usize },
    Nothing,
}

/// The decoder of one body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunked {
    expect: Expect,
    /// Bytes of chunk extensions so far: they carry nothing, so there is no need for many.
    extensions_size: usize,
    /// End of the decoded body.
    pub decoded: usize,
    /// End of what was looked at; what follows is to be offered again, with more behind it.
    pub examined: usize,
}

/// The digits of a chunk size that fit a u64 (RFC 9112 §7.1: recipients MUST anticipate large numerals).
const SIZE_DIGITS_MAX: usize = 16;

impl Chunked {
    /// A decoder for a body that begins at `begin`.
    pub fn new(begin: usize) -> Self {
        Chunked {
            expect: Expect::Size,
            extensions_size: 0,
            decoded: begin,
            examined: begin,
        }
    }

    /// Decodes as much of `bytes[examined..received]` as is complete; `true` when the body is.
    pub fn decode(&mut self, bytes: &mut [u8], received: usize) -> Result<bool, Reject> {
        assert!(self.decoded <= self.examined && self.examined <= received);
        // Every turn consumes a byte or ends, so there are at most `received` turns.
        loop {
            let rest = &bytes[self.examined..received];
            match self.expect {
                Expect::Size => {
                    let line_size_max = SIZE_DIGITS_MAX + CHUNK_EXTENSION_SIZE_MAX;
                    let Some(line) = line(rest, line_size_max, LINE_SIZE)? else {
                        return Ok(false);
                    };
                    let (size, extension_size) = chunk_size(line)?;
                    self.examined += line.len() + 2;
                    self.extensions_size += extension_size;
                    if self.extensions_size > CHUNK_EXTENSIONS_SIZE_MAX {
                        return Err(Reject::Chunk("chunk extensions of more than 4 KiB"));
                    }
                    self.expect = match size {
                        0 => Expect::Trailer { size: 0 },
                        remaining => Expect::Data { remaining },
                    };
                }
                Expect::Data { remaining } => {
                    let available = rest
                        .len()
                        .min(usize::try_from(remaining).unwrap_or(usize::MAX));
                    if available == 0 {
                        return Ok(false);
                    }
                    let end = self.examined + available;
                    if self.decoded != self.examined {
                        bytes.copy_within(self.examined..end, self.decoded);
                    }
                    self.decoded += available;
                    self.examined = end;
                    self.expect = match remaining - available as u64 {
                        0 => Expect::DataEnd,
                        remaining => Expect::Data { remaining },
                    };
                }
                Expect::DataEnd => match rest {
                    [b'\r', b'\n', ..] => {
                        self.examined += 2;
                        self.expect = Expect::Size;
                    }
                    [] | [b'\r'] => return Ok(false),
                    _ => return Err(Reject::Chunk("chunk data longer than its size")),
                },
                Expect::Trailer { size } => {
                    let left = TRAILER_SIZE_MAX - size;
                    let Some(line) = line(rest, left, Reject::TrailerSize)? else {
                        return Ok(false);
                    };
                    let line_size = line.len() + 2;
                    if line.is_empty() {
                        self.examined += line_size;
                        self.expect = Expect::Nothing;
                        return Ok(true);
                    }
                    trailer_field(line)?;
                    self.examined += line_size;
                    self.expect = Expect::Trailer {
                        size: (size + line_size).min(TRAILER_SIZE_MAX),
                    };
                }
                Expect::Nothing => return Ok(true),
            }
        }
    }

    /// Moves what was not examined down behind the decoded body; the new end of what is received.
    pub fn close_gap(&mut self, bytes: &mut [u8], received: usize) -> usize {
        let gap = self.examined - self.decoded;
        if gap > 0 {
            bytes.copy_within(self.examined..received, self.decoded);
            self.examined = self.decoded;
        }
        received - gap
    }

    /// Follows the request to another place: everything moved down by `distance`.
    pub fn shift_down(&mut self, distance: usize) {
        self.decoded -= distance;
        self.examined -= distance;
    }
}

const LINE_SIZE: Reject = Reject::Chunk("a line that is too long");

/// The line at the start of `rest`, without its CRLF; `None` while its end is not there.
fn line(rest: &[u8], size_max: usize, too_long: Reject) -> Result<Option<&[u8]>, Reject> {
    let window = &rest[..rest.len().min(size_max + 2)];
    match memchr::memchr2(b'\r', b'\n', window) {
        Some(at) if window[at] == b'\n' => Err(Reject::Chunk("a line that ends with a bare LF")),
        Some(at) => match window.get(at + 1) {
            Some(b'\n') => Ok(Some(&rest[..at])),
            Some(_) => Err(Reject::Chunk("a line with a bare CR")),
            None if at < size_max + 1 => Ok(None),
            None => Err(too_long),
        },
        None if window.len() <= size_max => Ok(None),
        None => Err(too_long),
    }
}

/// RFC 9112 §7.1: `chunk-size [ chunk-ext ]`; the size, and the bytes of the extension.
fn chunk_size(line: &[u8]) -> Result<(u64, usize), Reject> {
    let digits = line
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    if digits == 0 || digits > SIZE_DIGITS_MAX {
        return Err(Reject::Chunk("a chunk size that is not hexadecimal"));
    }
    let size = line[..digits].iter().fold(0_u64, |size, byte| {
        let digit = (*byte as char).to_digit(16).unwrap_or(0);
        (size << 4) | u64::from(digit)
    });
    let extension = &line[digits..];
    if extension.is_empty()
        || (extension.len() <= CHUNK_EXTENSION_SIZE_MAX && is_extension(extension))
    {
        Ok((size, extension.len()))
    } else {
        Err(Reject::Chunk("a malformed chunk size line"))
    }
}

/// RFC 9112 §7.1.1: `*( ";" chunk-ext-name [ "=" chunk-ext-val ] )`, without the white space that is there only for
/// senders that were wrong already. Ignored once it has this form.
fn is_extension(mut rest: &[u8]) -> bool {
    // Every turn consumes a semicolon and a name, or ends.
    while let [b';', after @ ..] = rest {
        let name_size = token_size(after);
        if name_size == 0 {
            return false;
        }
        rest = &after[name_size..];
        if let [b'=', value @ ..] = rest {
            let value_size = match value {
                [b'"', ..] => quoted_string_size(value),
                _ => token_size(value),
            };
            if value_size == 0 {
                return false;
            }
            rest = &value[value_size..];
        }
    }
    rest.is_empty()
}

fn token_size(text: &[u8]) -> usize {
    text.iter().take_while(|byte| is_token_byte(**byte)).count()
}

/// RFC 9110 §5.6.4: the size of the quoted string that `text` begins with, quotes included; 0 where it has no end.
fn quoted_string_size(text: &[u8]) -> usize {
    let mut at = 1;
    while let Some(byte) = text.get(at).filter(|byte| is_field_byte(**byte)) {
        match byte {
            b'"' => return at + 1,
            b'\\' if text.get(at + 1).is_some_and(|byte| is_field_byte(*byte)) => at += 2,
            b'\\' => return 0,
            _ => at += 1,
        }
    }
    0
}

/// RFC 9110 §6.5.1: fields that a sender MUST NOT send as trailers, because a request would have been framed, routed,
/// authenticated or read by them.
const NOT_IN_TRAILERS: [&str; 14] = [
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "expect",
    "host",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "cookie",
];
const SIGNATURE_PREFIX: &[u8] = b"x-hub-";

/// RFC 9112 §7.1.2: a trailer field has the form of a header field.
fn trailer_field(line: &[u8]) -> Result<(), Reject> {
    let name_size = memchr::memchr(b':', line).unwrap_or(0);
    let (name, value) = line.split_at(name_size);
    if !is_token(name) || !value.iter().all(|byte| is_field_byte(*byte)) {
        return Err(Reject::Chunk("a malformed trailer field"));
    }
    match is_of_head(name) {
        true => Err(OF_HEAD),
        false => Ok(()),
    }
}

/// A trailer field that is refused in every version of HTTP.
pub(super) const OF_HEAD: Reject = Reject::Chunk("a trailer field that belongs into the head");

/// Whether a field of this name may only be in the head.
pub(super) fn is_of_head(name: &[u8]) -> bool {
    let is_signature = name
        .get(..SIGNATURE_PREFIX.len())
        .is_some_and(|prefix| prefix.eq_ignore_ascii_case(SIGNATURE_PREFIX));
    let is_refused = NOT_IN_TRAILERS
        .iter()
        .any(|refused| name.eq_ignore_ascii_case(refused.as_bytes()));
    is_signature || is_refused
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The body, and what follows it.
    type Decoded = (Vec<u8>, Vec<u8>);

    /// Offers `wire` in pieces that end at `cuts`, closing the gap after each.
    fn decode_in_pieces(wire: &[u8], cuts: &[usize]) -> Result<Option<Decoded>, Reject> {
        let mut bytes = vec![0xee; wire.len()];
        let mut chunked = Chunked::new(0);
        let mut received = 0;
        let mut sent = 0;
        for cut in cuts.iter().copied().chain([wire.len()]) {
            bytes[received..received + cut - sent].copy_from_slice(&wire[sent..cut]);
            received += cut - sent;
            sent = cut;
            if chunked.decode(&mut bytes, received)? {
                let mut rest = bytes[chunked.examined..received].to_vec();
                rest.extend_from_slice(&wire[sent..]);
                return Ok(Some((bytes[..chunked.decoded].to_vec(), rest)));
            }
            received = chunked.close_gap(&mut bytes, received);
        }
        Ok(None)
    }

    const WIRE: &[u8] =
        b"3\r\n{\"a\r\n1;x=y\r\n\"\r\n0003\r\n:1}\r\n0\r\nX-Sum: 5\r\n\r\nPOST / HTTP/1.1\r\n";
    const NEXT: &[u8] = b"POST / HTTP/1.1\r\n";

    #[test]
    fn a_body_cut_anywhere_decodes_to_the_same_bytes_and_leaves_what_follows() {
        for first in 0..WIRE.len() {
            for second in first..WIRE.len() {
                let (body, rest) = decode_in_pieces(WIRE, &[first, second]).unwrap().unwrap();
                assert_eq!(body, b"{\"a\":1}");
                assert_eq!(rest, NEXT);
            }
        }
    }

    #[test]
    fn byte_by_byte_too() {
        let cuts: Vec<usize> = (1..WIRE.len()).collect();
        let (body, rest) = decode_in_pieces(WIRE, &cuts).unwrap().unwrap();
        assert_eq!(
            (body.as_slice(), rest.as_slice()),
            (&b"{\"a\":1}"[..], NEXT)
        );
    }

    #[test]
    fn malformed_framing_is_refused_at_every_cut_and_never_taken() {
        let long_extension = format!(
            "1;{}\r\na\r\n0\r\n\r\n",
            "e".repeat(CHUNK_EXTENSION_SIZE_MAX + 1)
        );
        let long_trailer = format!("0\r\nX: {}\r\n\r\n", "v".repeat(TRAILER_SIZE_MAX));
        let extension = format!("1;{}\r\na\r\n", "e".repeat(CHUNK_EXTENSION_SIZE_MAX - 1));
        let chunks_max = CHUNK_EXTENSIONS_SIZE_MAX / CHUNK_EXTENSION_SIZE_MAX;
        let extensions = format!("{}0\r\n\r\n", extension.repeat(chunks_max));
        assert!(matches!(
            decode_in_pieces(extensions.as_bytes(), &[]),
            Ok(Some(_))
        ));
        let extensions = format!("{}0;e\r\n\r\n", extension.repeat(chunks_max));
        for wire in [
            "0x5\r\nhello\r\n0\r\n\r\n",
            "+5\r\nhello\r\n0\r\n\r\n",
            "-1\r\n",
            "5_0\r\n",
            " 5\r\nhello\r\n0\r\n\r\n",
            "5 \r\nhello\r\n0\r\n\r\n",
            "\r\n",
            "00000000000000005\r\nhello\r\n0\r\n\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "5\rhello\r\n0\r\n\r\n",
            "5\r\nhello!\r\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5;\r\nhello\r\n0\r\n\r\n",
            "5;a\0\r\nhello\r\n0\r\n\r\n",
            "5;a=\r\nhello\r\n0\r\n\r\n",
            "5;a b\r\nhello\r\n0\r\n\r\n",
            "5 ;a\r\nhello\r\n0\r\n\r\n",
            "5;a=\"b\r\nhello\r\n0\r\n\r\n",
            "5;a=\"b\"c\r\nhello\r\n0\r\n\r\n",
            "0\r\nContent-Length: 5\r\n\r\n",
            "0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "0\r\nhost: a\r\n\r\n",
            "0\r\nAuthorization: Bearer x\r\n\r\n",
            "0\r\nX-Hub-Signature-256: sha256=00\r\n\r\n",
            "0\r\n: v\r\n\r\n",
            "0\r\nname v\r\n\r\n",
            "0\r\n name: v\r\n\r\n",
            "0\r\nname: \x01\r\n\r\n",
            long_extension.as_str(),
            long_trailer.as_str(),
            extensions.as_str(),
        ] {
            let wire = wire.as_bytes();
            assert!(
                decode_in_pieces(wire, &[]).is_err(),
                "{:?}",
                String::from_utf8_lossy(wire)
            );
            for cut in (0..wire.len()).take(64) {
                assert!(decode_in_pieces(wire, &[cut]).is_err(), "{cut}");
            }
        }
    }

    #[test]
    fn extensions_of_the_right_form_are_ignored() {
        for extension in [";a", ";a=b", ";a=\"b c\\\"d\";e", ";a=\"\"", ";a;b=1;c"] {
            let wire = format!("5{extension}\r\nhello\r\n0{extension}\r\n\r\n");
            let (body, rest) = decode_in_pieces(wire.as_bytes(), &[]).unwrap().unwrap();
            assert_eq!(
                (body.as_slice(), rest.as_slice()),
                (&b"hello"[..], &b""[..])
            );
        }
    }

    #[test]
    fn a_trailer_section_that_is_too_long_is_named_as_such() {
        let fields = |count: usize| format!("0\r\n{}\r\n", "X-Y: 34567\r\n".repeat(count));
        let count = TRAILER_SIZE_MAX / 12;
        assert!(matches!(
            decode_in_pieces(fields(count).as_bytes(), &[]),
            Ok(Some(_))
        ));
        let long_line = format!("0\r\nX: {}\r\n\r\n", "v".repeat(TRAILER_SIZE_MAX));
        for wire in [fields(count + 1), long_line] {
            let wire = wire.as_bytes();
            let every: Vec<usize> = (0..wire.len()).collect();
            for cuts in [&[][..], &every] {
                assert_eq!(decode_in_pieces(wire, cuts), Err(Reject::TrailerSize));
            }
        }
    }

    #[test]
    fn the_largest_size_neither_overflows_nor_ends() {
        let outcome = decode_in_pieces(b"ffffffffffffffff\r\nabc", &[]);
        assert_eq!(outcome, Ok(None));
    }
}
