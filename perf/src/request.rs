//! Requests as they lie in memory before a run: head and body in one piece, with the answer that must come back.
//!
//! Comes after `event` and before `client`, which only copies these bytes into sockets.
//! Allocates while it builds; a run allocates nothing per request.

use weir_perf::event;

/// One request, ready to be written.
pub struct Request {
    /// Head and body, contiguous.
    pub bytes: Vec<u8>,
    pub body_size: usize,
    pub record_count: u64,
    /// The body that a server which accepted every record answers with.
    pub answer: Vec<u8>,
    /// The same records as the server's encoder would write them, for floor B.
    pub rows: Vec<u8>,
}

impl Request {
    /// A `POST` of `body`, which holds `record_count` records.
    pub fn post(body: &str, record_count: u64) -> Self {
        let media_type = media_type(record_count);
        let mut bytes = format!(
            "POST /perf HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        bytes.extend_from_slice(body.as_bytes());
        Request {
            bytes,
            body_size: body.len(),
            record_count,
            answer: format!("{{\"accepted\":{record_count}}}").into_bytes(),
            rows: Vec::new(),
        }
    }

    pub fn media_type(&self) -> &'static str {
        media_type(self.record_count)
    }

    fn with_rows<'a>(mut self, records: impl Iterator<Item = &'a str>) -> Self {
        for record in records {
            let row = format!(
                "{{\"timestamp\":\"2026-11-23T09:15:02.123Z\",\"tag\":\"perf\",\"log\":{}}}\n",
                event::compact(record)
            );
            self.rows.extend_from_slice(row.as_bytes());
        }
        self
    }

    /// One event, as one request and one row.
    pub fn single(event: &str) -> Self {
        Request::post(event, 1).with_rows(std::iter::once(event))
    }

    /// NDJSON: each line an event and a row.
    pub fn lines(body: &str) -> Self {
        Request::post(body, body.lines().count() as u64).with_rows(body.lines())
    }
}

fn media_type(record_count: u64) -> &'static str {
    if record_count == 1 {
        "application/json"
    } else {
        "application/x-ndjson"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_head_that_counts_its_body() {
        let request = Request::single("{ \"a\": 1 }");
        assert_eq!(
            request.bytes,
            b"POST /perf HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{ \"a\": 1 }"
        );
        assert_eq!(request.body_size, 10);
        assert_eq!(request.answer, b"{\"accepted\":1}");
    }

    #[test]
    fn rows_are_compact_and_one_per_record() {
        let request = Request::lines("{ \"a\": 1 }\n{ \"b\": 2 }\n");
        assert_eq!(request.record_count, 2);
        assert_eq!(
            request.rows,
            b"{\"timestamp\":\"2026-11-23T09:15:02.123Z\",\"tag\":\"perf\",\"log\":{\"a\":1}}\n\
              {\"timestamp\":\"2026-11-23T09:15:02.123Z\",\"tag\":\"perf\",\"log\":{\"b\":2}}\n"
        );
    }
}
