//! Replies: what goes back to the peer, gathered in one small buffer per connection.
//!
//! Before it: [`crate::connection`] knows the outcome of a request.
//! After it: one write carries every reply that was gathered.
//! Thread: one reactor. Allocates: the buffer, once per connection.
//! Invariant: a reply fits [`REPLY_SIZE_MAX`], and one is only added where that much room is left.
//! Not here: which status belongs to which reject ([`crate::error`] has the table).

use std::io::Write;

use crate::clock::HttpDate;
use crate::config::Ack;
use crate::error::{Refusal, Reject};
use crate::limits::{REPLY_BUFFER_SIZE, REPLY_SIZE_MAX};

/// What a connection does after a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    KeepAlive,
    /// Kept, and said so: what an HTTP/1.0 client waits for.
    KeepAliveConfirmed,
    Close,
}

/// Replies not yet written.
pub struct Replies {
    bytes: Vec<u8>,
}

impl Replies {
    pub fn new() -> Self {
        Replies {
            bytes: Vec::with_capacity(REPLY_BUFFER_SIZE),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether `reply_count` more replies are sure to fit.
    pub fn has_room(&self, reply_count: usize) -> bool {
        self.bytes.len() + reply_count * REPLY_SIZE_MAX <= REPLY_BUFFER_SIZE
    }

    /// Lends the bytes to a write; [`Replies::give_back`] returns the buffer.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    pub fn give_back(&mut self, mut bytes: Vec<u8>) {
        bytes.clear();
        self.bytes = bytes;
    }

    /// Drops replies that cannot be written any more.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// RFC 9110 §15.2.1.
    pub fn continue_100(&mut self) {
        self.bytes
            .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
    }

    /// `{"accepted":N}`, and which promise was kept; a 204 has no content (RFC 9110 §15.3.5).
    pub fn accepted(
        &mut self,
        status: u16,
        ack: Ack,
        record_count: u64,
        date: &HttpDate,
        persistence: Persistence,
    ) {
        let mut body = [0; 40];
        let body_size = written(&mut body, |body| {
            writeln!(body, "{{\"accepted\":{record_count}}}")
        });
        let content = if status == 204 {
            None
        } else {
            Some(&body[..body_size])
        };
        let field: &[u8] = match ack {
            Ack::Memory => b"Weir-Ack: memory\r\n",
            Ack::Durable => b"Weir-Ack: durable\r\n",
            Ack::Delivered => b"Weir-Ack: delivered\r\n",
        };
        self.reply(status, field, content, date, persistence);
    }

    /// `{"code","detail"}`, with `offset` and `line` where the body was the fault.
    pub fn rejected(&mut self, reject: &Reject, date: &HttpDate, persistence: Persistence) {
        let answer = reject.answer();
        let mut body = [0; 256];
        let body_size = written(&mut body, |body| {
            write!(body, "{{\"code\":\"{}\",", answer.code)?;
            if let Reject::Json(error) = reject {
                write!(body, "\"offset\":{},\"line\":{},", error.offset, error.line)?;
            }
            writeln!(body, "\"detail\":\"{}\"}}", answer.detail)
        });
        let mut fields = [0; 128];
        let fields_size = written(&mut fields, |fields| reject_fields(reject, fields));
        self.reply(
            answer.status,
            &fields[..fields_size],
            Some(&body[..body_size]),
            date,
            persistence,
        );
        if matches!(reject, Reject::Method { head: true }) {
            // RFC 9110 §9.3.2: the fields of the answer, its length among them, without its content.
            self.bytes.truncate(self.bytes.len() - body_size);
        }
    }

    /// 503: the promise cannot be made now; the request can be sent again.
    pub fn refused(&mut self, refusal: Refusal, date: &HttpDate, persistence: Persistence) {
        let answer = refusal.answer();
        let mut body = [0; 192];
        let body_size = written(&mut body, |body| {
            let (code, detail) = (answer.code, answer.detail);
            writeln!(body, "{{\"code\":\"{code}\",\"detail\":\"{detail}\"}}")
        });
        let mut field = [0; 24];
        let field_size = written(&mut field, |field| {
            write!(field, "Retry-After: {}\r\n", answer.retry_after)
        });
        self.reply(
            503,
            &field[..field_size],
            Some(&body[..body_size]),
            date,
            persistence,
        );
    }

    fn reply(
        &mut self,
        status: u16,
        fields: &[u8],
        content: Option<&[u8]>,
        date: &HttpDate,
        persistence: Persistence,
    ) {
        let size_before = self.bytes.len();
        let reason = reason_phrase(status);
        let connection = match persistence {
            Persistence::KeepAlive => "",
            Persistence::KeepAliveConfirmed => "Connection: keep-alive\r\n",
            Persistence::Close => "Connection: close\r\n",
        };
        let mut push = |bytes: &[u8]| self.bytes.extend_from_slice(bytes);
        push(b"HTTP/1.1 ");
        push(&[
            b'0' + (status / 100) as u8,
            b'0' + (status / 10 % 10) as u8,
            b'0' + (status % 10) as u8,
            b' ',
        ]);
        push(reason.as_bytes());
        push(b"\r\nDate: ");
        push(date);
        push(b"\r\n");
        push(fields);
        push(connection.as_bytes());
        if let Some(content) = content {
            let mut length = [0; 16];
            let length_size = written(&mut length, |length| write!(length, "{}", content.len()));
            push(b"Content-Type: application/json\r\nContent-Length: ");
            push(&length[..length_size]);
            push(b"\r\n\r\n");
            push(content);
        } else {
            push(b"\r\n");
        }
        let size = self.bytes.len() - size_before;
        assert!(size <= REPLY_SIZE_MAX, "a reply of {size} bytes");
        debug_assert!(self.bytes.capacity() == REPLY_BUFFER_SIZE);
    }
}

impl Default for Replies {
    fn default() -> Self {
        Self::new()
    }
}

/// The fields that belong to an answer.
fn reject_fields(reject: &Reject, fields: &mut &mut [u8]) -> std::io::Result<()> {
    match reject {
        // RFC 9110 §15.5.6.
        Reject::Method { .. } => fields.write_all(b"Allow: POST, PUT\r\n"),
        // RFC 9110 §15.5.16.
        Reject::ContentCoding => fields.write_all(b"Accept-Encoding: identity\r\n"),
        Reject::ContentType => {
            fields.write_all(b"Accept: application/json, application/x-ndjson\r\n")
        }
        // RFC 9110 §15.5.2: at least one challenge. There is no registered scheme for a signature in a field of its own.
        Reject::Unauthenticated(challenges) => {
            for (scheme, is_wanted) in [
                ("Bearer", challenges.bearer),
                ("Basic", challenges.basic),
                ("Hmac", challenges.hmac),
            ] {
                if is_wanted {
                    write!(fields, "WWW-Authenticate: {scheme} realm=\"weir\"\r\n")?;
                }
            }
            Ok(())
        }
        Reject::RateLimited {
            retry_after_seconds,
        } => write!(fields, "Retry-After: {retry_after_seconds}\r\n"),
        Reject::ConnectionCount => fields.write_all(b"Retry-After: 1\r\n"),
        _ => Ok(()),
    }
}

/// Runs `write` over the start of `buffer`; the bytes it wrote.
fn written(buffer: &mut [u8], write: impl FnOnce(&mut &mut [u8]) -> std::io::Result<()>) -> usize {
    let size = buffer.len();
    let mut rest = buffer;
    let outcome = write(&mut rest);
    assert!(outcome.is_ok(), "a reply's body outgrew its buffer");
    size - rest.len()
}

/// RFC 9110 §15.
fn reason_phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE: &HttpDate = b"Mon, 23 Nov 2026 09:15:02 GMT";

    fn text(write: impl FnOnce(&mut Replies)) -> String {
        let mut replies = Replies::new();
        write(&mut replies);
        String::from_utf8(replies.take()).unwrap()
    }

    #[test]
    fn an_accepted_request_says_how_many_records() {
        assert_eq!(
            text(|replies| replies.accepted(201, Ack::Durable, 3, DATE, Persistence::KeepAlive)),
            "HTTP/1.1 201 Created\r\nDate: Mon, 23 Nov 2026 09:15:02 GMT\r\n\
             Weir-Ack: durable\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{\"accepted\":3}\n"
        );
    }

    #[test]
    fn a_204_has_no_content_and_no_length() {
        assert_eq!(
            text(|replies| replies.accepted(204, Ack::Memory, 3, DATE, Persistence::Close)),
            "HTTP/1.1 204 No Content\r\nDate: Mon, 23 Nov 2026 09:15:02 GMT\r\n\
             Weir-Ack: memory\r\nConnection: close\r\n\r\n"
        );
    }

    #[test]
    fn the_longest_replies_fit_and_are_json() {
        for refusal in Refusal::ALL {
            let text = text(|replies| replies.refused(refusal, DATE, Persistence::KeepAlive));
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 503 ") && head.contains("\r\nRetry-After: "));
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(body["code"], refusal.answer().code);
        }
        for reject in Reject::samples() {
            let text = text(|replies| {
                assert!(replies.has_room(1));
                replies.rejected(&reject, DATE, Persistence::KeepAliveConfirmed);
            });
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("Content-Length: {}", body.len())));
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(body["code"], reject.answer().code);
        }
    }
}
