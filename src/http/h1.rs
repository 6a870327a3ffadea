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

use super::syntax::{is_token, is_token_byte};
use super::{media_type, target};
use crate::error::Reject;
use crate::limits::{HEAD_SIZE_MAX, HEADER_COUNT_MAX, REQUEST_LINE_SIZE_MAX};

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
    /// Another one of RFC 9110 §9.3, or PATCH.
    Other,
    /// One that weir has never heard of; methods are case-sensitive.
    Unknown,
}

/// What `Expect` asks for (RFC 9110 §10.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expectation {
    None,
    /// The client waits for `100 Continue`.
    Continue,
    Unknown,
}

/// What the head of a request says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the head, the empty line included.
    pub size: usize,
    /// Where the path of the target lies, without query; of POST and PUT it starts with a slash.
    pub path: Range<usize>,
    pub framing: Framing,
    pub method: Method,
    /// Whether the connection may serve another request (RFC 9112 §9.3).
    pub keep_alive: bool,
    /// An HTTP/1.0 client that asked for keep-alive wants it confirmed.
    pub keep_alive_confirm: bool,
    pub expectation: Expectation,
    /// A `Content-Encoding` other than `identity`.
    pub content_encoded: bool,
    /// `Content-Type` names JSON, or is absent.
    pub json: bool,
}

/// Whether the bytes behind the first `examined` can change what [`parse`] says: it is asked again only when another
/// line has come or a limit is reached, so that small reads stay linear.
pub fn is_worth_parsing(bytes: &[u8], examined: usize) -> bool {
    let crosses = |limit: usize| examined < limit && bytes.len() >= limit;
    (examined == 0 && !bytes.is_empty())
        || crosses(LINE_END_MAX)
        || crosses(HEAD_SIZE_MAX)
        || memchr::memchr(b'\n', &bytes[examined..]).is_some()
}

/// The longest request line, with its CRLF.
const LINE_END_MAX: usize = REQUEST_LINE_SIZE_MAX + 2;

/// Parses the head at the start of `bytes`; `None` while it is incomplete.
///
/// The answer is the same however the bytes arrive, for it is given from whole lines only.
pub fn parse(bytes: &[u8]) -> Result<Option<Head>, Reject> {
    let bytes = &bytes[..bytes.len().min(HEAD_SIZE_MAX)];
    // RFC 9112 §2.2 asks servers to skip an empty line here, for clients of the last century.
    if bytes.first().is_some_and(|byte| !is_token_byte(*byte)) {
        return Err(Reject::Head("the request does not start with a method"));
    }
    let line = &bytes[..bytes.len().min(LINE_END_MAX)];
    let Some(line_end) = memchr::memchr(b'\n', line) else {
        return match line.len() {
            LINE_END_MAX => Err(Reject::RequestLineSize),
            _ => Ok(None),
        };
    };
    let mut fields = [const { MaybeUninit::<httparse::Header>::uninit() }; HEADER_COUNT_MAX];
    let mut request = httparse::Request::new(&mut []);
    let size = match request.parse_with_uninit_headers(bytes, &mut fields) {
        Ok(httparse::Status::Complete(size)) => size,
        Ok(httparse::Status::Partial) if bytes.len() == HEAD_SIZE_MAX => {
            return Err(Reject::HeadSize);
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::Version) => return Err(version_fault(&bytes[..line_end])),
        Err(error) => return Err(fault(error)),
    };
    // httparse takes a bare LF for the end of a line; RFC 9112 §2.2 lets us refuse.
    if memchr::memchr_iter(b'\n', &bytes[line_end..size])
        .any(|at| bytes[line_end + at - 1] != b'\r')
    {
        return Err(Reject::Head("a line that ends with a bare LF"));
    }
    head(&request, bytes, size).map(Some)
}

/// The fields that a request has at most once: RFC 9110 §5.3 allows a list only where the field's definition does.
#[derive(Default)]
struct Seen(u16);

impl Seen {
    const HOST: u16 = 1;
    const CONTENT_LENGTH: u16 = 2;
    const TRANSFER_ENCODING: u16 = 4;
    const CONTENT_TYPE: u16 = 8;
    const CONTENT_ENCODING: u16 = 16;
    const AUTHORIZATION: u16 = 32;
    const SIGNATURE: u16 = 64;
    const SIGNATURE_256: u16 = 128;

    fn once(&mut self, field: u16, twice: Reject) -> Result<(), Reject> {
        if self.0 & field != 0 {
            return Err(twice);
        }
        self.0 |= field;
        Ok(())
    }

    fn has(&self, field: u16) -> bool {
        self.0 & field != 0
    }
}

const TWICE: Reject = Reject::Head("a field that may be there once is there twice");

fn head(request: &httparse::Request<'_, '_>, bytes: &[u8], size: usize) -> Result<Head, Reject> {
    let (Some(method), Some(target_text), Some(minor)) =
        (request.method, request.path, request.version)
    else {
        return Err(Reject::Head("an incomplete request line"));
    };
    let http_1_1 = minor == 1;
    let mut seen = Seen::default();
    let mut length = 0;
    let mut coding = Ok(());
    let mut host: &[u8] = b"";
    let mut close = false;
    let mut keep = false;
    let mut expectation = Expectation::None;
    let mut content_encoded = false;
    let mut json = true;
    for field in request.headers.iter() {
        let name = field.name;
        let value = field.value;
        // Lengths first: most fields of a request are none of these.
        match name.len() {
            4 if name.eq_ignore_ascii_case("host") => {
                seen.once(Seen::HOST, Reject::Host("more than one Host"))?;
                target::host(value)?;
                host = value;
            }
            6 if name.eq_ignore_ascii_case("expect") => {
                if !value.eq_ignore_ascii_case(b"100-continue") {
                    expectation = Expectation::Unknown;
                } else if expectation == Expectation::None {
                    expectation = Expectation::Continue;
                }
            }
            10 if name.eq_ignore_ascii_case("connection") => {
                for option in value.split(|byte| *byte == b',') {
                    close |= option.trim_ascii().eq_ignore_ascii_case(b"close");
                    keep |= option.trim_ascii().eq_ignore_ascii_case(b"keep-alive");
                }
            }
            12 if name.eq_ignore_ascii_case("content-type") => {
                seen.once(Seen::CONTENT_TYPE, TWICE)?;
                json = media_type::is_json(value);
            }
            13 if name.eq_ignore_ascii_case("authorization") => {
                seen.once(Seen::AUTHORIZATION, TWICE)?;
            }
            14 if name.eq_ignore_ascii_case("content-length") => {
                seen.once(
                    Seen::CONTENT_LENGTH,
                    Reject::Framing("more than one Content-Length"),
                )?;
                without_tabs(bytes, name, value)?;
                length = content_length(value)?;
            }
            15 if name.eq_ignore_ascii_case("x-hub-signature") => {
                seen.once(Seen::SIGNATURE, TWICE)?;
            }
            16 if name.eq_ignore_ascii_case("content-encoding") => {
                seen.once(Seen::CONTENT_ENCODING, TWICE)?;
                content_encoded = !value.eq_ignore_ascii_case(b"identity");
            }
            17 if name.eq_ignore_ascii_case("transfer-encoding") => {
                seen.once(
                    Seen::TRANSFER_ENCODING,
                    Reject::Framing("more than one Transfer-Encoding"),
                )?;
                without_tabs(bytes, name, value)?;
                coding = transfer_coding(value);
            }
            19 if name.eq_ignore_ascii_case("x-hub-signature-256") => {
                seen.once(Seen::SIGNATURE_256, TWICE)?;
            }
            _ => {}
        }
    }
    let chunked = seen.has(Seen::TRANSFER_ENCODING);
    if chunked && seen.has(Seen::CONTENT_LENGTH) {
        // RFC 9112 §6.1: a request smuggling attempt, or a broken sender.
        return Err(Reject::Framing("both Content-Length and Transfer-Encoding"));
    }
    if chunked && !http_1_1 {
        return Err(Reject::Framing("Transfer-Encoding in an HTTP/1.0 request"));
    }
    if http_1_1 && !seen.has(Seen::HOST) {
        // RFC 9112 §3.2: a server MUST respond with 400.
        return Err(Reject::Host("no Host"));
    }
    let target = target::target(method, target_text.as_bytes())?;
    if let Some(authority) = target.authority
        && seen.has(Seen::HOST)
        && !target_text.as_bytes()[authority].eq_ignore_ascii_case(host)
    {
        return Err(Reject::Host("the Host is not that of the request target"));
    }
    // Last, so that whatever is in doubt is refused as such.
    coding?;
    let target_begin = method.len() + 1;
    debug_assert_eq!(
        &bytes[target_begin..target_begin + target_text.len()],
        target_text.as_bytes()
    );
    Ok(Head {
        size,
        path: target_begin + target.path.start..target_begin + target.path.end,
        framing: if chunked {
            Framing::Chunked
        } else {
            Framing::Length(length)
        },
        method: match method {
            "POST" | "PUT" => Method::Store,
            "HEAD" => Method::Head,
            "GET" | "DELETE" | "OPTIONS" | "PATCH" | "CONNECT" | "TRACE" => Method::Other,
            _ => Method::Unknown,
        },
        keep_alive: !close && (http_1_1 || keep),
        keep_alive_confirm: !http_1_1 && keep && !close,
        // RFC 9110 §10.1.1: an expectation of an HTTP/1.0 client is ignored.
        expectation: if http_1_1 {
            expectation
        } else {
            Expectation::None
        },
        content_encoded,
        json,
    })
}

/// The value of a field of a head that [`parse`] has taken, without white space around it; more than one is refused.
/// A second look at the bytes, for the few requests whose route asks for it.
pub fn field<'a>(head: &'a [u8], name: &str) -> Result<Option<&'a [u8]>, Reject> {
    let mut found = None;
    for line in head.split(|byte| *byte == b'\n').skip(1) {
        let Some((line_name, rest)) = line.split_at_checked(name.len()) else {
            continue;
        };
        if let [b':', value @ ..] = rest
            && line_name.eq_ignore_ascii_case(name.as_bytes())
            && found.replace(value.trim_ascii()).is_some()
        {
            return Err(TWICE);
        }
    }
    Ok(found)
}

/// RFC 9110 §8.6: one or more digits, nothing else; no list, no sign, no spaces within.
fn content_length(value: &[u8]) -> Result<u64, Reject> {
    const FAULT: Reject = Reject::Framing("a Content-Length that is not a decimal number");
    const OVERFLOW: Reject = Reject::Framing("a Content-Length of 2^63 or more");
    if value.is_empty() {
        return Err(FAULT);
    }
    let mut length = 0_u64;
    let mut overflows = false;
    for byte in value {
        if !byte.is_ascii_digit() {
            return Err(FAULT);
        }
        // Below the limit, ten times it and a digit still fit.
        overflows |= length > LENGTH_MAX / 10;
        length = length.wrapping_mul(10).wrapping_add(u64::from(byte - b'0'));
        overflows |= length > LENGTH_MAX;
    }
    if overflows { Err(OVERFLOW) } else { Ok(length) }
}

/// What every implementation can count to, in bytes.
const LENGTH_MAX: u64 = i64::MAX as u64;

/// RFC 9112 §6.1: chunked exactly once and last; weir understands no other coding.
fn transfer_coding(value: &[u8]) -> Result<(), Reject> {
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let mut after_chunked = false;
    for coding in value.split(|byte| *byte == b',') {
        let coding = coding.trim_ascii();
        // RFC 9112 §7.1: a parameter of chunked is an error, and no other coding is known to have one.
        if !is_token(coding) {
            return Err(Reject::Framing(
                "a Transfer-Encoding that is not a list of codings",
            ));
        }
        if after_chunked {
            return Err(Reject::Framing("a transfer coding behind chunked"));
        }
        after_chunked = coding.eq_ignore_ascii_case(b"chunked");
    }
    Err(Reject::TransferCoding)
}

/// RFC 9110 §5.5 allows tabs around a value, and some readers forget: not around those that frame the body.
fn without_tabs(bytes: &[u8], name: &str, value: &[u8]) -> Result<(), Reject> {
    let offset = |part: &[u8]| part.as_ptr() as usize - bytes.as_ptr() as usize;
    if value.is_empty() {
        return Ok(());
    }
    let before = &bytes[offset(name.as_bytes()) + name.len()..offset(value)];
    let mut after = bytes[offset(value) + value.len()..]
        .iter()
        .take_while(|byte| **byte != b'\r');
    if before.contains(&b'\t') || after.any(|byte| *byte == b'\t') {
        return Err(Reject::Framing("a tab around a field that frames the body"));
    }
    Ok(())
}

/// A version that is written as one but is not HTTP/1: RFC 9110 §15.6.6; else it is no version.
fn version_fault(line: &[u8]) -> Reject {
    let version = match memchr::memrchr(b' ', line) {
        Some(space) => line[space + 1..].trim_ascii_end(),
        None => line,
    };
    match version {
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
            if major.is_ascii_digit() && minor.is_ascii_digit() && *major != b'1' =>
        {
            Reject::Version
        }
        _ => Reject::Head("a version other than HTTP/1.0 and HTTP/1.1"),
    }
}

fn fault(error: httparse::Error) -> Reject {
    Reject::Head(match error {
        httparse::Error::TooManyHeaders => return Reject::HeaderCount,
        httparse::Error::HeaderName => "a header field name that is not a token",
        httparse::Error::HeaderValue => "a header field value with a control character",
        httparse::Error::NewLine => "a line that does not end with CRLF",
        httparse::Error::Token => "a method or target that is not a token",
        httparse::Error::Status | httparse::Error::Version => "a malformed request head",
    })
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
        assert_eq!(head.expectation, Expectation::Continue);
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
    fn a_field_is_found_by_its_whole_name_and_only_once() {
        let head = b"POST /x:y HTTP/1.1\r\nHost: a\r\nX-A:  b c \t\r\nX-AB: d\r\nX-E:\r\n\r\n";
        assert_eq!(field(head, "x-a"), Ok(Some(&b"b c"[..])));
        assert_eq!(field(head, "X-AB"), Ok(Some(&b"d"[..])));
        assert_eq!(field(head, "x-e"), Ok(Some(&b""[..])));
        assert_eq!(field(head, "X"), Ok(None));
        assert_eq!(field(head, "POST /x"), Ok(None));
        assert_eq!(
            field(b"POST / HTTP/1.1\r\nA: b\r\na: b\r\n\r\n", "A"),
            Err(TWICE)
        );
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
