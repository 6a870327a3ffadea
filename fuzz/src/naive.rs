//! The naive twin of `weir::records::json`: the same promise kept slowly, a byte at a time, on the heap.
//!
//! An oracle, so it shares no code with the module it judges. It reads a whole body first and moves nothing.

/// A refusal: code, offset, line.
pub type Refusal = (&'static str, usize, usize);

const DEPTH_MAX: usize = 128;

/// The compacted records of `body`.
pub fn records(body: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
    let mut reader = Reader { body, at: 0 };
    reader.body_records().map_err(|code| {
        let line = 1 + body[..reader.at]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count();
        (code, reader.at, line)
    })
}

/// On an error `at` is the offset to report.
struct Reader<'a> {
    body: &'a [u8],
    at: usize,
}

type Step<T> = Result<T, &'static str>;

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    fn white(&mut self) {
        while self.peek().is_some_and(|byte| b" \t\n\r".contains(&byte)) {
            self.at += 1;
        }
    }

    /// The error at `at`: the end of the body, or this byte.
    fn wrong<T>(&self) -> Step<T> {
        Err(if self.at == self.body.len() {
            "json_truncated"
        } else {
            "json_syntax"
        })
    }

    fn body_records(&mut self) -> Step<Vec<Vec<u8>>> {
        let mut records = Vec::new();
        let mut any = false;
        loop {
            self.white();
            match self.peek() {
                None if any => return Ok(records),
                None => return Err("empty_body"),
                Some(b'{') => {
                    let mut record = Vec::new();
                    self.value(&mut record, 0)?;
                    records.push(record);
                }
                Some(b'[') => self.top_array(&mut records)?,
                Some(b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => return Err("json_scalar"),
                Some(_) => return Err("json_syntax"),
            }
            any = true;
        }
    }

    fn top_array(&mut self, records: &mut Vec<Vec<u8>>) -> Step<()> {
        self.at += 1;
        self.white();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.white();
            let mut record = Vec::new();
            self.value(&mut record, 1)?;
            records.push(record);
            self.white();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return self.wrong(),
            }
        }
    }

    /// One value at `at`, compacted into `out`, inside `outside` containers. A stack of closing brackets, no recursion.
    fn value(&mut self, out: &mut Vec<u8>, outside: usize) -> Step<()> {
        let mut closers = Vec::new();
        loop {
            // A value is due, and in an object its key first.
            self.white();
            let byte = self.peek();
            let mut value_done = true;
            match byte {
                Some(b'{' | b'[') => {
                    if outside + closers.len() == DEPTH_MAX {
                        return Err("json_depth");
                    }
                    self.copy(out, 1);
                    let closer = if byte == Some(b'{') { b'}' } else { b']' };
                    closers.push(closer);
                    self.white();
                    if self.peek() == Some(closer) {
                        self.copy(out, 1);
                        closers.pop();
                    } else {
                        value_done = false;
                        if closer == b'}' {
                            self.key(out)?;
                        }
                    }
                }
                Some(b'"') => self.string(out)?,
                Some(b'-' | b'0'..=b'9') => self.number(out)?,
                Some(b't') => self.word(out, b"true")?,
                Some(b'f') => self.word(out, b"false")?,
                Some(b'n') => self.word(out, b"null")?,
                _ => return self.wrong(),
            }
            while value_done {
                let Some(&closer) = closers.last() else {
                    return Ok(());
                };
                self.white();
                match self.peek() {
                    Some(b',') => {
                        self.copy(out, 1);
                        if closer == b'}' {
                            self.white();
                            self.key(out)?;
                        }
                        value_done = false;
                    }
                    Some(byte) if byte == closer => {
                        self.copy(out, 1);
                        closers.pop();
                    }
                    _ => return self.wrong(),
                }
            }
        }
    }

    fn copy(&mut self, out: &mut Vec<u8>, size: usize) {
        out.extend_from_slice(&self.body[self.at..self.at + size]);
        self.at += size;
    }

    fn key(&mut self, out: &mut Vec<u8>) -> Step<()> {
        if self.peek() != Some(b'"') {
            return self.wrong();
        }
        self.string(out)?;
        self.white();
        if self.peek() != Some(b':') {
            return self.wrong();
        }
        self.copy(out, 1);
        Ok(())
    }

    fn string(&mut self, out: &mut Vec<u8>) -> Step<()> {
        self.copy(out, 1);
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.copy(out, 1);
                    return Ok(());
                }
                Some(b'\\') => {
                    self.copy(out, 1);
                    match self.peek() {
                        Some(b'u') => {
                            self.copy(out, 1);
                            for _ in 0..4 {
                                match self.peek() {
                                    Some(b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                                        self.copy(out, 1)
                                    }
                                    _ => return self.wrong(),
                                }
                            }
                        }
                        Some(byte) if b"\"\\/bfnrt".contains(&byte) => self.copy(out, 1),
                        _ => return self.wrong(),
                    }
                }
                Some(0x20..=0x7F) => self.copy(out, 1),
                None | Some(0..=0x1F) => return self.wrong(),
                Some(0x80..) => self.code_point(out)?,
            }
        }
    }

    /// Unicode, table 3-7: well-formed sequences of two to four bytes.
    fn code_point(&mut self, out: &mut Vec<u8>) -> Step<()> {
        let second = 0x80..=0xBF_u8;
        let (size, second) = match self.body[self.at] {
            0xC2..=0xDF => (2, second),
            0xE0 => (3, 0xA0..=0xBF),
            0xED => (3, 0x80..=0x9F),
            0xE1..=0xEF => (3, second),
            0xF0 => (4, 0x90..=0xBF),
            0xF1..=0xF3 => (4, second),
            0xF4 => (4, 0x80..=0x8F),
            _ => return Err("json_utf8"),
        };
        for index in 1..size {
            match self.body.get(self.at + index) {
                None => {
                    self.at = self.body.len();
                    return Err("json_truncated");
                }
                Some(byte) if index == 1 && second.contains(byte) => {}
                Some(0x80..=0xBF) if index > 1 => {}
                Some(_) => return Err("json_utf8"),
            }
        }
        self.copy(out, size);
        Ok(())
    }

    fn word(&mut self, out: &mut Vec<u8>, word: &[u8]) -> Step<()> {
        for &byte in word {
            if self.peek() != Some(byte) {
                return self.wrong();
            }
            self.copy(out, 1);
        }
        self.scalar_end()
    }

    fn number(&mut self, out: &mut Vec<u8>) -> Step<()> {
        if self.peek() == Some(b'-') {
            self.copy(out, 1);
        }
        if self.peek() == Some(b'0') {
            self.copy(out, 1);
        } else {
            self.digits(out)?;
        }
        if self.peek() == Some(b'.') {
            self.copy(out, 1);
            self.digits(out)?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.copy(out, 1);
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.copy(out, 1);
            }
            self.digits(out)?;
        }
        self.scalar_end()
    }

    fn digits(&mut self, out: &mut Vec<u8>) -> Step<()> {
        if !self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            return self.wrong();
        }
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.copy(out, 1);
        }
        Ok(())
    }

    /// Nothing but white space and punctuation may touch a number or a literal.
    fn scalar_end(&self) -> Step<()> {
        match self.peek() {
            Some(byte) if !b" \t\n\r{}[]:,\"".contains(&byte) => Err("json_syntax"),
            _ => Ok(()),
        }
    }
}
