//! HTTP/2 in the words of HTTP/1.1: the head of a stream as text, and a reply's text as the fields of a stream.
//!
//! Before it: the `h2` crate has a header block, decompressed and free of what RFC 9113 §8.2 forbids.
//! After it: [`super::h1`] judges the text as it judges any head, so that every rule is written once; what
//! [`super::reply`] answers goes back the same way.
//! Thread: any; pure. Allocates: the fields of an answer.
//! Invariant: a head is as the peer sent it, or refused: nothing is put right.
//! Not here: frames ([`super::frames`]), and the end of the body, which HTTP/2 has of its own.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST, HeaderName, HeaderValue};
use http::{HeaderMap, Response, StatusCode, request};

use super::chunked::{OF_HEAD, is_of_head};
use super::h1::{self, Head};
use crate::error::Reject;
use crate::limits::{HEADER_COUNT_MAX, TRAILER_SIZE_MAX};

/// What is written of a head so far.
struct Text<'a> {
    bytes: &'a mut [u8],
    size: usize,
}

impl Text<'_> {
    fn push(&mut self, part: &[u8]) -> Result<(), Reject> {
        let end = self.size + part.len();
        self.bytes
            .get_mut(self.size..end)
            .ok_or(Reject::HeadSize)?
            .copy_from_slice(part);
        self.size = end;
        Ok(())
    }

    fn push_field(&mut self, name: &str, value: &[u8]) -> Result<(), Reject> {
        // RFC 9113 §8.2.1: a value MUST NOT start or end with white space, which HTTP/1.1 would take away.
        if value.trim_ascii().len() != value.len() {
            return Err(Reject::Head(
                "a header field value that begins or ends with white space",
            ));
        }
        for part in [name.as_bytes(), b": ", value, b"\r\n"] {
            self.push(part)?;
        }
        Ok(())
    }
}

/// Writes the head of a request to the front of `bytes`, and judges it.
///
/// A body whose size is not told stands there as a chunked one: what follows from that is the same.
pub fn head(request: &request::Parts, has_body: bool, bytes: &mut [u8]) -> Result<Head, Reject> {
    let mut text = Text { bytes, size: 0 };
    let authority = request.uri.authority().map(|authority| authority.as_str());
    let target = request.uri.path_and_query().map(|target| target.as_str());
    // RFC 9113 §8.5: CONNECT has an authority and no path.
    let target = target.or(authority).unwrap_or("");
    for part in [request.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        text.push(part.as_bytes())?;
    }
    // RFC 9113 §8.3.1: `:authority` stands for Host, and MUST NOT differ from one that is there too.
    if let Some(authority) = authority {
        match request.headers.get(HOST) {
            None => text.push_field("host", authority.as_bytes())?,
            Some(host) if host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()) => {}
            Some(_) => return Err(Reject::Host("the Host is not that of :authority")),
        }
    }
    for (name, value) in &request.headers {
        text.push_field(name.as_str(), value.as_bytes())?;
    }
    if has_body && !request.headers.contains_key(CONTENT_LENGTH) {
        text.push_field("transfer-encoding", b"chunked")?;
    }
    text.push(b"\r\n")?;
    let size = text.size;
    match h1::parse(&bytes[..size])? {
        Some(head) if head.size == size => Ok(head),
        // A field cannot hold a line's end, so this is not reached; if it were, the head is in doubt.
        _ => Err(Reject::Head("a head that ends before its end")),
    }
}

/// Looks at the trailer section, which is then dropped: as for HTTP/1.1 ([`super::chunked`]).
pub fn trailers(fields: &HeaderMap) -> Result<(), Reject> {
    let mut size = 0;
    for (name, value) in fields {
        if is_of_head(name.as_str().as_bytes()) {
            return Err(OF_HEAD);
        }
        size += name.as_str().len() + value.len() + ": \r\n".len();
    }
    if size > TRAILER_SIZE_MAX {
        return Err(Reject::TrailerSize);
    }
    Ok(())
}

/// Turns one reply of [`super::reply`] into the head of a response and its content.
pub fn response(reply: Vec<u8>) -> (Response<()>, Bytes) {
    let reply = Bytes::from(reply);
    let mut fields = [httparse::EMPTY_HEADER; HEADER_COUNT_MAX];
    let mut parsed = httparse::Response::new(&mut fields);
    let (Ok(httparse::Status::Complete(size)), Some(status)) = (parsed.parse(&reply), parsed.code)
    else {
        unreachable!("a reply is one");
    };
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status).expect("a reply's status");
    for field in parsed.headers.iter() {
        // RFC 9113 §8.2.2: a connection is not spoken of in its streams.
        if field.name.eq_ignore_ascii_case("connection") {
            continue;
        }
        let name = HeaderName::from_bytes(field.name.as_bytes()).expect("a reply's field");
        let value = HeaderValue::from_maybe_shared(reply.slice_ref(field.value));
        response
            .headers_mut()
            .append(name, value.expect("a reply's field"));
    }
    (response, reply.slice(size..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::HttpDate;
    use crate::config::Ack;
    use crate::error::Refusal;
    use crate::http::h1::{Framing, Method};
    use crate::http::reply::{Persistence, Replies};

    fn parts(build: impl FnOnce(request::Builder) -> request::Builder) -> request::Parts {
        let builder = http::Request::builder()
            .method("POST")
            .uri("http://a.example/x?y");
        build(builder).body(()).unwrap().into_parts().0
    }

    fn text(request: &request::Parts, has_body: bool) -> Result<(String, Head), Reject> {
        let mut bytes = [0; 1024];
        let head = head(request, has_body, &mut bytes)?;
        Ok((
            String::from_utf8(bytes[..head.size].to_vec()).unwrap(),
            head,
        ))
    }

    #[test]
    fn a_head_is_what_http_1_1_would_say() {
        let request = parts(|head| head.header("x-a", "b").header("content-length", "3"));
        let (text, head) = text(&request, true).unwrap();
        assert_eq!(
            text,
            "POST /x?y HTTP/1.1\r\nhost: a.example\r\nx-a: b\r\ncontent-length: 3\r\n\r\n"
        );
        assert_eq!(&text[head.path.clone()], "/x");
        assert_eq!(
            (head.method, head.framing),
            (Method::Store, Framing::Length(3))
        );
    }

    #[test]
    fn a_body_without_a_length_is_one_whose_end_comes_later() {
        let request = parts(|head| head);
        assert_eq!(text(&request, true).unwrap().1.framing, Framing::Chunked);
        assert_eq!(text(&request, false).unwrap().1.framing, Framing::Length(0));
    }

    #[test]
    fn what_is_in_doubt_is_refused() {
        let host = |value: &'static str| parts(move |head| head.header("host", value));
        assert!(text(&host("A.example"), false).is_ok());
        for request in [
            host("b.example"),
            parts(|head| head.header("host", "a.example").header("host", "a.example")),
            parts(|head| head.header("x-a", " b")),
            parts(|head| head.header("x-a", "b\t")),
            parts(|head| head.uri("http://user@a.example/x")),
            parts(|head| head.uri("http://a.example/x/../y")),
            parts(|head| head.uri("/x")),
            parts(|head| {
                head.header("content-length", "3")
                    .header("content-length", "3")
            }),
        ] {
            assert!(text(&request, false).is_err(), "{request:?}");
        }
        let mut small = [0; 40];
        let request = parts(|head| head.header("x-a", "b"));
        assert_eq!(head(&request, false, &mut small), Err(Reject::HeadSize));
        let many = parts(|mut head| {
            for index in 0..HEADER_COUNT_MAX {
                head = head.header(format!("x-{index}"), "v");
            }
            head
        });
        assert_eq!(text(&many, false).unwrap_err(), Reject::HeaderCount);
    }

    #[test]
    fn a_connect_has_an_authority_and_no_path() {
        let request = parts(|head| head.method("CONNECT").uri("a.example:443"));
        assert_eq!(text(&request, false).unwrap().1.method, Method::Other);
    }

    #[test]
    fn trailers_may_not_say_what_a_head_says() {
        let mut fields = HeaderMap::new();
        fields.insert("x-sum", HeaderValue::from_static("5"));
        assert_eq!(trailers(&fields), Ok(()));
        for name in ["content-length", "host", "x-hub-signature-256"] {
            let mut fields = fields.clone();
            fields.insert(HeaderName::from_static(name), HeaderValue::from_static("5"));
            assert_eq!(trailers(&fields), Err(OF_HEAD), "{name}");
        }
        let long = "v".repeat(TRAILER_SIZE_MAX);
        fields.insert("x-long", HeaderValue::from_str(&long).unwrap());
        assert_eq!(trailers(&fields), Err(Reject::TrailerSize));
    }

    #[test]
    fn every_reply_becomes_a_response_without_the_connection() {
        const DATE: &HttpDate = b"Mon, 23 Nov 2026 09:15:02 GMT";
        let mut replies = Replies::new();
        replies.accepted(201, Ack::Durable, 3, DATE, Persistence::Close);
        let (accepted, content) = response(replies.take());
        assert_eq!(accepted.status(), 201);
        assert_eq!(accepted.headers()["weir-ack"], "durable");
        assert_eq!(accepted.headers()["content-length"], "15");
        assert!(!accepted.headers().contains_key("connection"));
        assert_eq!(content, "{\"accepted\":3}\n");
        let answered = |write: &dyn Fn(&mut Replies)| {
            let mut replies = Replies::new();
            write(&mut replies);
            response(replies.take())
        };
        for reject in Reject::samples() {
            let (head, content) =
                answered(&|replies| replies.rejected(&reject, DATE, Persistence::KeepAlive));
            assert_eq!(head.status(), reject.answer().status);
            let body: serde_json::Value = serde_json::from_slice(&content).unwrap();
            assert_eq!(body["code"], reject.answer().code);
        }
        for refusal in Refusal::ALL {
            let (head, _) =
                answered(&|replies| replies.refused(refusal, DATE, Persistence::KeepAlive));
            assert_eq!(head.status(), 503);
            assert!(head.headers().contains_key("retry-after"));
        }
    }
}
