//! The head of an HTTP/1 request, parsed where it lies (RFC 9112).
//!
//! Before it: bytes in a slab, of which the first belong to a request line.
//! After it: [`crate::connection`] decides from the [`Head`] alone where the body goes.
//! Thread: any; pure. Allocates: never.
//! Invariant: framing that could be read in two ways is refused, so what weir takes for the body is what any
//! intermediary took for it (RFC 9112 §11.2).
//! Not here: the chunked body ([`super::chunked`]).

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::error::Reject;
use crate::limits::HEADER_COUNT_MAX;

/// How the end of the body is found (RFC 9112 §6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Bytes; 0 where the head names none.
    Length(u64),
    Chunked,
}

/// The method, as far as it makes a difference here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// POST or PUT.
    Store,
    Head,
    Other,
}

/// What the head of a request says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the head, the empty line included.
    pub size: usize,
    /// Where the path of the target lies: without query.
    pub path: Range<usize>,
    pub framing: Framing,
    pub method: Method,
    /// Whether the connection may serve another request (RFC 9112 §9.3).
    pub keep_alive: bool,
    /// An HTTP/1.0 client that asked for keep-alive wants it confirmed.
    pub keep_alive_confirm: bool,
    /// The client waits for `100 Continue` (RFC 9110 §10.1.1).
    pub expect_continue: bool,
    /// A `Content-Encoding` other than `identity`.
    pub content_encoded: bool,
}

/// Parses the head at the start of `bytes`; `None` while it is incomplete.
pub fn parse(bytes: &[u8]) -> Result<Option<Head>, Reject> {
    let mut fields = [const { MaybeUninit::<httparse::Header>::uninit() }; HEADER_COUNT_MAX];
    let mut request = httparse::Request::new(&mut []);
    let size = match request.parse_with_uninit_headers(bytes, &mut fields) {
        Ok(httparse::Status::Complete(size)) => size,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Reject::HeaderCount),
        Err(error) => return Err(Reject::Head(fault(error))),
    };
    // httparse takes a bare LF and leading empty lines for line ends; RFC 9112 §2.2 lets us refuse.
    if bytes.first() == Some(&b'\r') || bytes.first() == Some(&b'\n') {
        return Err(Reject::Head("an empty line before the request line"));
    }
    if memchr::memchr_iter(b'\n', &bytes[..size]).any(|at| at == 0 || bytes[at - 1] != b'\r') {
        return Err(Reject::Head("a line that ends with a bare LF"));
    }
    head(&request, bytes, size).map(Some)
}

fn head(request: &httparse::Request<'_, '_>, bytes: &[u8], size: usize) -> Result<Head, Reject> {
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version)
    else {
        return Err(Reject::Head("an incomplete request line"));
    };
    let http_1_1 = minor == 1;
    let mut length = None;
    let mut chunked = false;
    let mut hosts = 0;
    let mut close = false;
    let mut keep = false;
    let mut expect_continue = false;
    let mut content_encoded = false;
    for field in request.headers.iter() {
        let name = field.name;
        // Lengths first: most fields of a request are none of these.
        match name.len() {
            4 if name.eq_ignore_ascii_case("host") => hosts += 1,
            6 if name.eq_ignore_ascii_case("expect") => {
                if !field.value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Reject::Expectation);
                }
                expect_continue = true;
            }
            10 if name.eq_ignore_ascii_case("connection") => {
                for option in field.value.split(|byte| *byte == b',') {
                    close |= option.trim_ascii().eq_ignore_ascii_case(b"close");
                    keep |= option.trim_ascii().eq_ignore_ascii_case(b"keep-alive");
                }
            }
            14 if name.eq_ignore_ascii_case("content-length") => {
                if length.is_some() {
                    return Err(Reject::Head("more than one Content-Length"));
                }
                length = Some(content_length(field.value)?);
            }
            16 if name.eq_ignore_ascii_case("content-encoding") => {
                content_encoded |= !field.value.eq_ignore_ascii_case(b"identity");
            }
            17 if name.eq_ignore_ascii_case("transfer-encoding") => {
                if chunked {
                    return Err(Reject::Head("more than one Transfer-Encoding"));
                }
                // RFC 9112 §6.1: chunked exactly once and last; weir understands no other coding.
                if !field.value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Reject::TransferCoding);
                }
                chunked = true;
            }
            _ => {}
        }
    }
    if chunked && length.is_some() {
        // RFC 9112 §6.1: a request smuggling attempt, or a broken sender.
        return Err(Reject::Head("both Content-Length and Transfer-Encoding"));
    }
    if chunked && !http_1_1 {
        return Err(Reject::Head("Transfer-Encoding in an HTTP/1.0 request"));
    }
    if hosts > 1 || (http_1_1 && hosts == 0) {
        // RFC 9112 §3.2.
        return Err(Reject::Head(
            "an HTTP/1.1 request has exactly one Host field",
        ));
    }
    if !target.starts_with('/') {
        return Err(Reject::Head(
            "the request target does not start with a slash",
        ));
    }
    let path_size = memchr::memchr(b'?', target.as_bytes()).unwrap_or(target.len());
    let path_begin = method.len() + 1;
    debug_assert_eq!(
        &bytes[path_begin..path_begin + target.len()],
        target.as_bytes()
    );
    Ok(Head {
        size,
        path: path_begin..path_begin + path_size,
        framing: if chunked {
            Framing::Chunked
        } else {
            Framing::Length(length.unwrap_or(0))
        },
        method: match method {
            "POST" | "PUT" => Method::Store,
            "HEAD" => Method::Head,
            _ => Method::Other,
        },
        keep_alive: !close && (http_1_1 || keep),
        keep_alive_confirm: !http_1_1 && keep && !close,
        expect_continue: expect_continue && http_1_1,
        content_encoded,
    })
}

/// RFC 9110 §8.6: one or more digits, nothing else; no list, no sign, no spaces within.
fn content_length(value: &[u8]) -> Result<u64, Reject> {
    const FAULT: Reject = Reject::Head("a Content-Length that is not a decimal number");
    // 19 digits always fit a u64.
    if value.is_empty() || value.len() > 19 {
        return Err(FAULT);
    }
    value.iter().try_fold(0_u64, |length, byte| {
        if byte.is_ascii_digit() {
            Ok(length * 10 + u64::from(byte - b'0'))
        } else {
            Err(FAULT)
        }
    })
}

fn fault(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::HeaderName => "a header field name that is not a token",
        httparse::Error::HeaderValue => "a header field value with a control character",
        httparse::Error::NewLine => "a line that does not end with CRLF",
        httparse::Error::Token => "a method or target that is not a token",
        httparse::Error::Version => "a version other than HTTP/1.0 and HTTP/1.1",
        httparse::Error::Status | httparse::Error::TooManyHeaders => "a malformed request head",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(head: &str) -> Head {
        parse(head.as_bytes()).unwrap().unwrap()
    }

    #[test]
    fn a_post_says_where_its_path_and_body_are() {
        let text = "POST /github/push?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n{}";
        let head = parsed(text);
        assert_eq!(&text[head.path.clone()], "/github/push");
        assert_eq!(head.framing, Framing::Length(12));
        assert_eq!(head.size, text.len() - 2);
        assert_eq!(head.method, Method::Store);
        assert!(head.keep_alive && !head.keep_alive_confirm);
    }

    #[test]
    fn every_prefix_of_a_head_is_incomplete_and_never_an_error() {
        let text = "PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n";
        for end in 0..text.len() {
            assert_eq!(parse(&text.as_bytes()[..end]), Ok(None), "{end}");
        }
        let head = parsed(text);
        assert_eq!(head.framing, Framing::Chunked);
        assert!(head.expect_continue);
    }

    #[test]
    fn persistence_follows_rfc_9112_9_3() {
        for (version, connection, keep, confirm) in [
            ("1.1", "", true, false),
            ("1.1", "Connection: close\r\n", false, false),
            ("1.1", "Connection: TE, Close\r\n", false, false),
            ("1.0", "", false, false),
            ("1.0", "Connection: keep-alive\r\n", true, true),
            ("1.0", "Connection: keep-alive, close\r\n", false, false),
        ] {
            let head = parsed(&format!(
                "POST / HTTP/{version}\r\nHost: a\r\n{connection}\r\n"
            ));
            assert_eq!(
                (head.keep_alive, head.keep_alive_confirm),
                (keep, confirm),
                "{connection}"
            );
        }
    }

    #[test]
    fn framing_in_doubt_is_refused() {
        for fields in [
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "Content-Length: 5\r\nContent-Length: 5\r\n",
            "Content-Length: 5, 5\r\n",
            "Content-Length: +5\r\n",
            "Content-Length: -0\r\n",
            "Content-Length: 0x5\r\n",
            "Content-Length: \r\n",
            "Content-Length: 99999999999999999999\r\n",
            "Transfer-Encoding: xchunked\r\n",
            "Transfer-Encoding: chunked, chunked\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: gzip\r\n",
            "Host: b\r\n",
            "Name : v\r\n",
            " folded: v\r\n",
            "Bare: lf\n",
            "Nul: a\0b\r\n",
            "Expect: coffee\r\n",
        ] {
            let text = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
            assert!(parse(text.as_bytes()).is_err(), "{fields:?}");
        }
        for text in [
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.2\r\nHost: a\r\n\r\n",
            "POST a HTTP/1.1\r\nHost: a\r\n\r\n",
            "\r\nPOST / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST  / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\x16\x03\x01\x02\0\x01\0\x01\x03\x03",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn too_many_fields_are_named_as_such() {
        let mut text = String::from("POST / HTTP/1.1\r\nHost: a\r\n");
        for index in 0..HEADER_COUNT_MAX {
            text.push_str(&format!("X-{index}: v\r\n"));
        }
        assert_eq!(parse(text.as_bytes()), Err(Reject::HeaderCount));
    }
}
