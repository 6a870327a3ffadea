//! The request target and the host: what they may look like, and where the path lies.
//!
//! Before it: [`super::h1`] has the request line and the Host field.
//! After it: [`crate::route`] compares the path byte for byte.
//! Thread: any; pure. Allocates: never.
//! Invariant: nothing is decoded and nothing normalised. A target that some other reader would first have to
//! normalise (dot segments, empty segments, an encoding of what must not be encoded) is refused instead, so the path
//! that a route is found by is the path that every reader sees.
//! Not here: which paths have a route.

use std::net::Ipv6Addr;
use std::ops::Range;

use super::syntax::{is_host_byte, is_path_byte, is_query_byte};
use crate::error::Reject;

/// Where the parts of a target lie in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Starts with a slash; empty for the targets of CONNECT and of `OPTIONS *`, which have no path.
    pub path: Range<usize>,
    /// Of an absolute-form target.
    pub authority: Option<Range<usize>>,
}

const NO_PATH: Range<usize> = 0..0;

/// Reads the target of a request with this method (RFC 9112 §3.2).
pub fn target(method: &str, target: &[u8]) -> Result<Target, Reject> {
    if target.first() == Some(&b'/') {
        return Ok(Target {
            path: path(target, 0)?,
            authority: None,
        });
    }
    let without_path = Ok(Target {
        path: NO_PATH,
        authority: None,
    });
    match method {
        "CONNECT" => {
            host(target)
                .map_err(|_| Reject::Target("the target of CONNECT is a host and a port"))?;
            without_path
        }
        "OPTIONS" if target == b"*" => without_path,
        _ => absolute_form(target),
    }
}

/// RFC 9112 §3.2.2: `http://authority/path`; servers MUST accept it.
fn absolute_form(target: &[u8]) -> Result<Target, Reject> {
    const FAULT: Reject =
        Reject::Target("the request target is neither a path nor an http or https URI");
    let scheme = ["http://", "https://"].into_iter().find(|scheme| {
        target
            .get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme.as_bytes()))
    });
    let begin = scheme.ok_or(FAULT)?.len();
    let end = target[begin..]
        .iter()
        .position(|byte| matches!(byte, b'/' | b'?' | b'#'))
        .map_or(target.len(), |at| begin + at);
    host(&target[begin..end])?;
    let path = match target.get(end) {
        Some(b'/') => path(target, end)?,
        // RFC 9110 §4.2.3: an empty path is the path `/`; the scheme's last slash stands for it.
        other => {
            if other.is_some() {
                query(&target[end..])?;
            }
            begin - 1..begin
        }
    };
    Ok(Target {
        path,
        authority: Some(begin..end),
    })
}

/// The path that starts with the slash at `begin`; the rest of the target is looked at as well.
fn path(target: &[u8], begin: usize) -> Result<Range<usize>, Reject> {
    // One pass over plain bytes; what is rarer is looked at where it turns up.
    let mut at = begin;
    let mut encoded = false;
    // RFC 3986 §5.2.4 would remove dot segments; §6.2.3 leaves empty ones, but many servers merge them.
    let mut segment = begin + 1;
    let end = loop {
        let Some(byte) = target.get(at) else {
            break at;
        };
        match byte {
            b'/' => {
                if at > begin && !is_plain(&target[segment..at], true) {
                    return Err(Reject::Target("the path has an empty or a dot segment"));
                }
                segment = at + 1;
            }
            b'%' => {
                percent_encoded(&target[at..])?;
                encoded = true;
            }
            b'?' => break at,
            byte if is_path_byte(*byte) => {}
            _ => {
                return Err(Reject::Target(
                    "the request target has a byte that is not of a URI",
                ));
            }
        }
        at += 1;
    };
    if !is_plain(&target[segment..end], false) {
        return Err(Reject::Target("the path has an empty or a dot segment"));
    }
    if encoded && !decodes_to_utf8(&target[begin..end]) {
        return Err(Reject::Target("the path is not UTF-8 when decoded"));
    }
    query(&target[end..])?;
    Ok(begin..end)
}

/// Whether a segment is one that every reader leaves alone; only the last one may be empty.
fn is_plain(segment: &[u8], inner: bool) -> bool {
    match segment {
        [] => !inner,
        [b'.' | b'%', ..] => {
            let dots = [&b"."[..], b".."];
            !dots
                .iter()
                .any(|dots| decoded(segment).eq(dots.iter().copied()))
        }
        _ => true,
    }
}

/// A query and its question mark, or nothing: the form only, as weir does not use it.
fn query(text: &[u8]) -> Result<(), Reject> {
    for (at, byte) in text.iter().enumerate() {
        match byte {
            b'%' => percent_encoded(&text[at..])?,
            byte if is_query_byte(*byte) => {}
            _ => {
                return Err(Reject::Target(
                    "the request target has a byte that is not of a URI",
                ));
            }
        }
    }
    Ok(())
}

/// RFC 3986 §2.1: a percent sign and two hexadecimal digits; here no control character, which is only ever sent to
/// confuse.
fn percent_encoded(text: &[u8]) -> Result<(), Reject> {
    let byte = match text {
        [_, high, low, ..] => hex(*high).zip(hex(*low)).map(|(high, low)| high << 4 | low),
        _ => None,
    };
    match byte {
        Some(byte) if byte.is_ascii_control() => Err(Reject::Target(
            "the request target encodes a control character",
        )),
        Some(_) => Ok(()),
        None => Err(Reject::Target(
            "a percent sign without two hexadecimal digits",
        )),
    }
}

/// The bytes that `text` stands for.
fn decoded(text: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (byte, size) = match rest {
            [b'%', high, low, ..] => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, 3),
                _ => (b'%', 1),
            },
            [byte, ..] => (*byte, 1),
            [] => return None,
        };
        rest = &rest[size..];
        Some(byte)
    })
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|digit| digit as u8)
}

/// Whether the decoded bytes are UTF-8 (RFC 3629 §3, so no overlong forms), looked at one character at a time.
fn decodes_to_utf8(text: &[u8]) -> bool {
    let mut character = [0; 4];
    let mut size = 0;
    for byte in decoded(text) {
        character[size] = byte;
        size += 1;
        match std::str::from_utf8(&character[..size]) {
            Ok(_) => size = 0,
            // It may still become a character.
            Err(error) if error.error_len().is_none() && size < 4 => {}
            Err(_) => return false,
        }
    }
    size == 0
}

/// RFC 9110 §7.2: `uri-host [ ":" port ]`, and nothing of the other things that can be in an authority.
pub fn host(value: &[u8]) -> Result<(), Reject> {
    const FAULT: Reject =
        Reject::Host("the host is not a name or an address with an optional port");
    let name_size = match value {
        [b'[', literal @ ..] => {
            let size = memchr::memchr(b']', literal).ok_or(FAULT)?;
            let literal = std::str::from_utf8(&literal[..size]).map_err(|_| FAULT)?;
            literal.parse::<Ipv6Addr>().map_err(|_| FAULT)?;
            size + 2
        }
        // RFC 9110 §4.2.1: an http URI with an empty host is invalid.
        _ => match value.iter().take_while(|byte| is_host_byte(**byte)).count() {
            0 => return Err(FAULT),
            size => size,
        },
    };
    match &value[name_size..] {
        [] => Ok(()),
        [b':', port @ ..] => {
            let number = port.iter().try_fold(0_u32, |number, digit| {
                let digit = char::from(*digit).to_digit(10)?;
                Some(number * 10 + digit).filter(|number| *number <= u32::from(u16::MAX))
            });
            match number {
                Some(_) if !port.is_empty() => Ok(()),
                _ => Err(Reject::Host(
                    "the port of the host is not a number up to 65535",
                )),
            }
        }
        _ => Err(FAULT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_of(method: &str, text: &str) -> Result<String, Reject> {
        target(method, text.as_bytes()).map(|target| text[target.path].to_owned())
    }

    #[test]
    fn the_path_is_what_was_sent() {
        for (text, path) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/", "/a/"),
            ("/a?b=/../c//d", "/a"),
            ("/a?x?y", "/a"),
            ("/%c3%A9/x%2Fy", "/%c3%A9/x%2Fy"),
            ("/.a/..b/...", "/.a/..b/..."),
            ("/%2ea", "/%2ea"),
            ("/-._~!$&'()*+,;=:@", "/-._~!$&'()*+,;=:@"),
            ("http://a", "/"),
            ("http://a?q", "/"),
            ("HTTPS://a:1/b?c", "/b"),
            ("http://[::1]:80/b", "/b"),
        ] {
            assert_eq!(path_of("POST", text).as_deref(), Ok(path), "{text}");
        }
        assert_eq!(path_of("OPTIONS", "*").as_deref(), Ok(""));
        assert_eq!(path_of("CONNECT", "a:443").as_deref(), Ok(""));
        let absolute = target("POST", b"http://a:1/b").unwrap();
        assert_eq!(absolute.authority, Some(7..10));
    }

    #[test]
    fn what_would_have_to_be_normalised_or_decoded_is_refused() {
        for text in [
            "",
            "a",
            "*",
            "!",
            "a/b",
            "//",
            "//a",
            "/a//b",
            "/a//",
            "/..",
            "/../",
            "/a/../b",
            "/.",
            "/a/./b",
            "/%2e%2e/b",
            "/a/.%2E",
            "/%2e",
            "/%",
            "/%4",
            "/%zz",
            "/%0",
            "/%00",
            "/%0d%0a",
            "/%7F",
            "/%c0%af",
            "/%ff",
            "/%c3",
            "/%c3/a",
            "/%ed%a0%80",
            "/a#b",
            "/a\\b",
            "/a\"b",
            "/é",
            "/a?%zz",
            "/a?%00",
            "/a?b#c",
            "/a?[x]",
            "http://",
            "http:///a",
            "http://u@a/",
            "http://a,b/",
            "http://a:99999/",
            "ftp://a/",
            "http://a/..",
            "http://a#b",
            "http:/a",
        ] {
            assert!(path_of("POST", text).is_err(), "{text:?}");
        }
        assert!(path_of("CONNECT", "a/b").is_err());
        assert!(path_of("POST", "*").is_err());
    }

    #[test]
    fn a_host_is_a_name_or_an_address_and_a_port() {
        for text in [
            "a",
            "a.b-c_d~",
            "127.0.0.1:9880",
            "a:0",
            "a:65535",
            "[::1]",
            "[::ffff:1.2.3.4]:80",
            "A.B",
        ] {
            assert_eq!(host(text.as_bytes()), Ok(()), "{text}");
        }
        for text in [
            "",
            ":80",
            "a,b",
            "a b",
            "u@a",
            "u:p@a",
            "a/b",
            "a:",
            "a:65536",
            "a:99999999999",
            "a:+1",
            "a:8 ",
            "[::1",
            "[::1]x",
            "[]",
            "[a]",
            "[::1%25e]",
            "::1",
            "a:80:80",
            "a?b",
            "a%20b",
            "é",
            "http://a",
        ] {
            assert!(host(text.as_bytes()).is_err(), "{text}");
        }
    }

    /// The pass that is made for speed, against decoding first and looking then.
    #[test]
    fn agrees_with_a_reader_that_decodes_first() {
        let alphabet = ["/", ".", "%2e", "a", "%c3", "%a9", "?"];
        for length in 0..=5_u32 {
            for number in 0..alphabet.len().pow(length) {
                let tail: String = (0..length)
                    .map(|digit| alphabet[number / alphabet.len().pow(digit) % alphabet.len()])
                    .collect();
                let text = format!("/{tail}");
                let path = text.split('?').next().unwrap();
                let segments: Vec<Vec<u8>> = path[1..]
                    .split('/')
                    .map(|segment| decoded(segment.as_bytes()).collect())
                    .collect();
                let inner = &segments[..segments.len() - 1];
                let plain = inner.iter().all(|segment| !segment.is_empty())
                    && segments
                        .iter()
                        .all(|segment| segment != b"." && segment != b"..")
                    && segments
                        .iter()
                        .all(|segment| std::str::from_utf8(segment).is_ok());
                let expected = plain.then(|| path.to_owned());
                assert_eq!(path_of("POST", &text).ok(), expected, "{text}");
            }
        }
    }
}
