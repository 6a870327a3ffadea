//! From the bytes of a blob to its records: inflating, splitting, checking.
//!
//! Before it: [`super`] downloaded the blob. After it: [`crate::standin::catalog`] takes the records.
//! Thread: the runtime's blocking pool. Allocates: a buffer of one record, and the records that are kept;
//! `multijson` holds the whole inflated blob.
//! Invariant: cheap: each byte is inflated once and searched once, and parsed only as [`RowCheck`] says.
//! Not here: comments and single-quoted names, which Kusto's parser is said to tolerate and weir never sends.
//!
//! It inflates with zlib-rs, the faster of two libraries that were tried; tests that must not trust both halves of one
//! library inflate with the other, miniz_oxide.
//! Source: Kusto documentation, "Data formats supported for ingestion", "Ingestion of invalid data", "Ingestion error codes".

use std::collections::VecDeque;
use std::io::{self, Read};

use memchr::memchr_iter;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use zlib_rs::{Inflate, InflateFlush, Status};

use crate::standin::catalog::{Refused, TableCounts};
use crate::standin::row::{Shape, VALUE_SIZE_MAX};

/// How strictly lines of `json` are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowCheck {
    /// Every line is parsed.
    Every,
    /// One line in this many is parsed; of the others only the braces are looked at. For measurements.
    OneIn(u64),
}

/// What is made of a gzip blob with several members; whether Kusto reads beyond the first is not documented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Members {
    /// All are read, and what follows the last is ignored, as SharpZipLib does.
    All,
    /// What follows the first is ignored: rows are lost without an error.
    First,
    /// The blob fails.
    Reject,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    MultiJson,
}

/// The largest record.
const RECORD_SIZE_MAX: usize = 64 << 20;
/// The largest blob, inflated, unless the message lifts the limit.
const RAW_SIZE_MAX: u64 = 6 << 30;
/// The largest `multijson` blob that is played.
const MULTI_JSON_SIZE_MAX: u64 = 1 << 30;
/// What is read at a time, unless a record is larger.
const BUFFER_SIZE: usize = 256 << 10;
const BOM: &[u8] = b"\xef\xbb\xbf";

pub(super) struct Blob<'a> {
    pub bytes: &'a [u8],
    pub gzip: bool,
    pub format: Format,
    pub ignore_size_limit: bool,
    pub members: Members,
    pub check: RowCheck,
    /// How many records to keep, and bytes of them.
    pub records_max: (usize, usize),
    pub shape: &'a Shape,
}

#[derive(Debug, Default)]
pub(super) struct Harvest {
    pub counts: TableCounts,
    /// The newest records, oldest first.
    pub records: VecDeque<Vec<u8>>,
    records_size: usize,
    line_count: u64,
    /// What the service tolerates and a careful client does not send.
    pub violations: Vec<&'static str>,
}

impl Blob<'_> {
    /// Reads it all; gives a failure's code and details where the service would discard the blob.
    pub fn harvest(&self) -> Result<Harvest, Refused> {
        if self.bytes.is_empty() {
            return Err(("BadRequest_EmptyBlob", "The blob is empty.".into()));
        }
        let mut harvest = Harvest::default();
        if self.gzip {
            let mut inflate = Gunzip {
                rest: self.bytes,
                member: Some(gzip_member()),
                members: self.members,
                trailing: false,
            };
            self.read(&mut inflate, &mut harvest)?;
            if inflate.trailing {
                harvest.violations.push("bytes follow the last gzip member");
            }
        } else {
            self.read(&mut { self.bytes }, &mut harvest)?;
        }
        if harvest.counts.rows == 0 {
            let details = "The input stream produced 0 bytes or no record of the format (Stream_NoDataToIngest).";
            return Err(("BadRequest_NoRecordsOrWrongFormat", details.into()));
        }
        harvest.counts.blobs = 1;
        Ok(harvest)
    }

    fn read(&self, reader: &mut dyn Read, harvest: &mut Harvest) -> Result<(), Refused> {
        match self.format {
            Format::Json => self.read_lines(reader, harvest),
            Format::MultiJson => self.read_values(reader, harvest),
        }
    }

    fn size_checked(&self, size: u64) -> Result<(), Refused> {
        if size > RAW_SIZE_MAX && !self.ignore_size_limit {
            return Err(("BadRequest_FileTooLarge", "The blob is above 6 GB.".into()));
        }
        Ok(())
    }

    fn read_lines(&self, reader: &mut dyn Read, harvest: &mut Harvest) -> Result<(), Refused> {
        let mut buffer = vec![0; BUFFER_SIZE];
        let mut filled = 0;
        loop {
            if filled == buffer.len() {
                if filled >= RECORD_SIZE_MAX {
                    let details = "A record is above 64 MB.";
                    return Err(("Stream_InputStreamTooLarge", details.into()));
                }
                buffer.resize(2 * filled, 0);
            }
            let count = reader.read(&mut buffer[filled..]).map_err(unreadable)?;
            if count == 0 {
                break;
            }
            if harvest.counts.raw_size == 0 && buffer.starts_with(BOM) {
                harvest
                    .violations
                    .push("the blob begins with a byte order mark");
                buffer[..BOM.len()].fill(b' ');
            }
            harvest.counts.raw_size += count as u64;
            self.size_checked(harvest.counts.raw_size)?;
            let searched = filled;
            filled += count;
            let mut start = 0;
            for end in memchr_iter(b'\n', &buffer[searched..filled]) {
                self.line(&buffer[start..searched + end], harvest);
                start = searched + end + 1;
            }
            buffer.copy_within(start..filled, 0);
            filled -= start;
        }
        self.line(&buffer[..filled], harvest);
        Ok(())
    }

    /// A line that is no JSON object is skipped without an error.
    fn line(&self, line: &[u8], harvest: &mut Harvest) {
        let line = line.trim_ascii();
        if line.is_empty() {
            return;
        }
        let parse = match self.check {
            RowCheck::Every => true,
            RowCheck::OneIn(count) => harvest.line_count.is_multiple_of(count.max(1)),
        };
        harvest.line_count += 1;
        let braces = line[0] == b'{' && line[line.len() - 1] == b'}';
        if !braces || (parse && serde_json::from_slice::<IgnoredAny>(line).is_err()) {
            harvest.counts.lines_skipped += 1;
            return;
        }
        const NOT_UTF8: &str =
            "a record is not UTF-8; Kusto replaces what it cannot read by U+FFFD";
        if parse
            && simdutf8::basic::from_utf8(line).is_err()
            && !harvest.violations.contains(&NOT_UTF8)
        {
            harvest.violations.push(NOT_UTF8);
        }
        self.keep(line, harvest);
    }

    /// One value that is no object, or that cannot be read, discards the whole blob.
    fn read_values(&self, reader: &mut dyn Read, harvest: &mut Harvest) -> Result<(), Refused> {
        let invalid = |details: String| ("BadRequest_InvalidBlob", details);
        let mut bytes = Vec::new();
        let mut bounded = reader.take(MULTI_JSON_SIZE_MAX + 1);
        bounded.read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > MULTI_JSON_SIZE_MAX {
            let details = "The stand-in plays multijson up to 1 GiB.";
            return Err(("BadRequest_FileTooLarge", details.into()));
        }
        harvest.counts.raw_size = bytes.len() as u64;
        let text = bytes.strip_prefix(BOM).unwrap_or(&bytes);
        let text = String::from_utf8_lossy(text);
        for value in serde_json::Deserializer::from_str(&text).into_iter::<&RawValue>() {
            let value = value.map_err(|error| invalid(error.to_string()))?.get();
            let elements = match value.as_bytes()[0] {
                b'{' => {
                    self.keep(value.as_bytes(), harvest);
                    continue;
                }
                b'[' => serde_json::from_str::<Vec<&RawValue>>(value),
                _ => return Err(invalid("a record is not an object".into())),
            };
            for element in elements.map_err(|error| invalid(error.to_string()))? {
                if !element.get().starts_with('{') {
                    return Err(invalid("a record is not an object".into()));
                }
                self.keep(element.get().as_bytes(), harvest);
            }
        }
        Ok(())
    }

    fn keep(&self, record: &[u8], harvest: &mut Harvest) {
        harvest.counts.rows += 1;
        if record.len() > VALUE_SIZE_MAX {
            harvest.counts.values_nulled += self.shape.row(record).nulled_count;
        }
        let (count_max, size_max) = self.records_max;
        // The memory of the oldest becomes that of the newest.
        let mut memory = Vec::new();
        while harvest.records.len() >= count_max.max(1)
            || harvest.records_size + record.len() > size_max
        {
            let Some(oldest) = harvest.records.pop_front() else {
                break;
            };
            harvest.records_size -= oldest.len();
            memory = oldest;
        }
        memory.clear();
        memory.extend_from_slice(record);
        harvest.records_size += record.len();
        harvest.records.push_back(memory);
    }
}

fn unreadable(error: io::Error) -> Refused {
    let details = format!("The blob cannot be read as gzip, which its name ends in: {error}");
    ("BadRequest_InvalidBlob", details)
}

/// One gzip member after the other.
struct Gunzip<'a> {
    rest: &'a [u8],
    /// The member being read; `None` at the end of all that is read.
    member: Option<Inflate>,
    members: Members,
    trailing: bool,
}

/// Reads a gzip header, deflate, and the trailer, which it checks (RFC 1952).
fn gzip_member() -> Inflate {
    // 15 bits of window, and 16 for gzip.
    Inflate::new(true, 16 + 15)
}

impl Gunzip<'_> {
    /// A member has ended: what about the next?
    fn next_member(&mut self) -> io::Result<()> {
        self.member = None;
        match (self.rest, self.members) {
            ([], _) | (_, Members::First) => {}
            (_, Members::Reject) => return Err(io::Error::other("more than one member")),
            ([0x1f, 0x8b, ..], Members::All) => self.member = Some(gzip_member()),
            (_, Members::All) => self.trailing = true,
        }
        Ok(())
    }
}

impl Read for Gunzip<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let (taken, given) = (member.total_in(), member.total_out());
            let status = member
                .decompress(self.rest, buffer, InflateFlush::NoFlush)
                .map_err(|error| io::Error::other(error.as_str()))?;
            let taken = (member.total_in() - taken) as usize;
            let given = (member.total_out() - given) as usize;
            self.rest = &self.rest[taken..];
            if status == Status::StreamEnd {
                self.next_member()?;
            } else if taken == 0 && given == 0 {
                return Err(io::Error::other("it ends within a member"));
            }
            if given > 0 {
                return Ok(given);
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;
    use crate::standin::row::Column;

    fn shape() -> Shape {
        Shape {
            columns: Arc::new([Column::new("a", "long").unwrap()]),
            mapping: None,
        }
    }

    fn blob<'a>(bytes: &'a [u8], gzip: bool, format: Format, shape: &'a Shape) -> Blob<'a> {
        Blob {
            bytes,
            gzip,
            format,
            ignore_size_limit: false,
            members: Members::All,
            check: RowCheck::Every,
            records_max: (3, 1 << 20),
            shape,
        }
    }

    fn member(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn json_skips_what_is_no_object_and_keeps_the_newest() {
        let shape = shape();
        let text = b"{\"a\":1}\r\n\nnull\n{\"a\":2\n{\"a\":3}\n{\"a\":4}\n{\"a\":5}";
        let harvest = blob(text, false, Format::Json, &shape).harvest().unwrap();
        assert_eq!((harvest.counts.rows, harvest.counts.lines_skipped), (4, 2));
        assert_eq!(harvest.counts.raw_size, text.len() as u64);
        let records = Vec::from(harvest.records);
        assert_eq!(records, [b"{\"a\":3}", b"{\"a\":4}", b"{\"a\":5}"]);
    }

    #[test]
    fn json_with_records_larger_than_the_buffer() {
        let shape = shape();
        let large = format!("{{\"a\":\"{}\"}}\n", "x".repeat(3 * BUFFER_SIZE));
        let text = large.repeat(2) + "{\"a\":1}\n";
        let harvest = blob(text.as_bytes(), false, Format::Json, &shape)
            .harvest()
            .unwrap();
        assert_eq!((harvest.counts.rows, harvest.counts.lines_skipped), (3, 0));
    }

    #[test]
    fn pretty_printed_json_leaves_nothing() {
        let shape = shape();
        let spoiled = blob(b"{\n\"a\": 1\n}\n", false, Format::Json, &shape).harvest();
        assert_eq!(spoiled.unwrap_err().0, "BadRequest_NoRecordsOrWrongFormat");
    }

    #[test]
    fn multijson_is_all_or_nothing() {
        let shape = shape();
        let good = b"{\n\"a\": 1\n} [{\"a\":2},{\"a\":3}]{\"a\":4}";
        let harvest = blob(good, false, Format::MultiJson, &shape)
            .harvest()
            .unwrap();
        assert_eq!(harvest.counts.rows, 4);
        for bad in [
            &b"{\"a\":1}\n{\"a\":"[..],
            b"{\"a\":1}\n7",
            b"[{\"a\":1},2]",
        ] {
            let spoiled = blob(bad, false, Format::MultiJson, &shape).harvest();
            assert_eq!(spoiled.unwrap_err().0, "BadRequest_InvalidBlob");
        }
    }

    #[test]
    fn the_name_alone_says_gzip() {
        let shape = shape();
        let zipped = member(b"{\"a\":1}\n");
        assert!(
            blob(b"{\"a\":1}\n", true, Format::Json, &shape)
                .harvest()
                .is_err()
        );
        assert!(
            blob(&zipped, false, Format::Json, &shape)
                .harvest()
                .is_err()
        );
        assert!(blob(&zipped, true, Format::Json, &shape).harvest().is_ok());
        let cut = blob(&zipped[..zipped.len() - 1], true, Format::Json, &shape).harvest();
        assert_eq!(cut.unwrap_err().0, "BadRequest_InvalidBlob");
    }

    #[test]
    fn members_are_read_as_configured() {
        let shape = shape();
        // The boundary is within a line, and one member is empty.
        let parts = [&b"{\"a\":1}\n{\"a\""[..], b"", b":2}\n"];
        let bytes: Vec<u8> = parts.iter().flat_map(|part| member(part)).collect();
        let read = |members| {
            let blob = Blob {
                members,
                ..blob(&bytes, true, Format::Json, &shape)
            };
            blob.harvest()
                .map(|harvest| harvest.counts.rows)
                .map_err(|refused| refused.0)
        };
        assert_eq!(read(Members::All), Ok(2));
        assert_eq!(read(Members::First), Ok(1));
        assert_eq!(read(Members::Reject), Err("BadRequest_InvalidBlob"));
    }

    #[test]
    fn a_sampled_check_looks_at_every_nth_line() {
        let shape = shape();
        let text = b"{\"a\":1}\n{bad}\n{bad}\n";
        let blob = Blob {
            check: RowCheck::OneIn(2),
            ..blob(text, false, Format::Json, &shape)
        };
        let harvest = blob.harvest().unwrap();
        assert_eq!((harvest.counts.rows, harvest.counts.lines_skipped), (2, 1));
    }
}
