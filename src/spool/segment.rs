//! Segments: the file of one batch. Its header, its delivery mark, and where its frames go.
//!
//! Before it: [`crate::upload_buffer`] opens a batch and takes a free segment for it.
//! After it: [`crate::commit`] writes what the cursor lays out; [`super::recover`] reads it back.
//! Thread: any; pure functions of bytes. Allocates: names, when a header is read.
//! Invariant: after the first commit of a batch its header is never written again, and the mark only once.
//! Not here: the files themselves ([`super::disk`]) and which of them are free ([`crate::spool`]).
//!
//! ```text
//! | mark, 1 sector | header, 7 sectors | frame 0 | frame 1 | …            | never written, or of an earlier use |
//! 0                512                 4096
//! ```
//!
//! Header and first frame are one write: a batch costs no sync before its first commit.
//! The mark stands before them and not in that write: it names the use of the file that was delivered, so it stays true
//! while the header of the next use is or is not yet on disk.

use std::borrow::Cow;

use uuid::Uuid;
use zlib_rs::crc32::crc32;

use super::frame::{FrameHeader, Totals, payload_crc, write_frame};
use crate::config::{Dedup, Table};
use crate::limits::{
    ENTITY_NAME_SIZE_MAX, FRAME_PAYLOAD_SIZE_MAX, SECTOR_SIZE, SEGMENT_HEADER_SIZE, frame_size,
};

/// The version of the format that is written. Version 1, which had no more than the names of database and table, is read
/// as well.
pub const VERSION: u32 = 2;

/// The oldest version that is read.
pub const VERSION_OLDEST: u32 = 1;

const MAGIC: [u8; 8] = *b"weirsegm";
const MARK_MAGIC: [u8; 8] = *b"weirdone";

// Offsets in the header, all little-endian.
const VERSION_AT: usize = 8;
const HEADER_CRC_AT: usize = 12;
const SEGMENT_ID_AT: usize = 16;
const SEGMENT_SIZE_AT: usize = 24;
const RUN_AT: usize = 32;
const SEQUENCE_AT: usize = 48;
const CORE_AT: usize = 56;
const DATABASE_SIZE_AT: usize = 60;
const TABLE_SIZE_AT: usize = 62;
const MAPPING_SIZE_AT: usize = 64;
const FLAGS_AT: usize = 66;
const BEGUN_AT_AT: usize = 72;
const NAMES_AT: usize = 80;
/// In version 1 the names stand where version 2 has the rest of its fields.
const NAMES_AT_IN_VERSION_1: usize = 64;

/// There is a mapping.
const FLAG_MAPPING: u16 = 1;
/// Ingested once by a tag.
const FLAG_INGEST_BY: u16 = 2;

/// Where the header begins in the segment; the mark's sector is before it.
pub const HEADER_AT: usize = SECTOR_SIZE;
const HEADER_SIZE: usize = SEGMENT_HEADER_SIZE - HEADER_AT;

// Offsets in the mark.
const MARK_CRC_AT: usize = 8;
const MARK_SEGMENT_ID_AT: usize = 16;

const _: () = {
    assert!(VERSION_AT == MAGIC.len() && HEADER_CRC_AT == VERSION_AT + 4);
    assert!(SEGMENT_ID_AT == HEADER_CRC_AT + 4 && SEGMENT_SIZE_AT == SEGMENT_ID_AT + 8);
    assert!(RUN_AT == SEGMENT_SIZE_AT + 8 && SEQUENCE_AT == RUN_AT + 16);
    assert!(CORE_AT == SEQUENCE_AT + 8 && DATABASE_SIZE_AT == CORE_AT + 4);
    assert!(TABLE_SIZE_AT == DATABASE_SIZE_AT + 2 && MAPPING_SIZE_AT == TABLE_SIZE_AT + 2);
    assert!(NAMES_AT_IN_VERSION_1 == MAPPING_SIZE_AT && FLAGS_AT == MAPPING_SIZE_AT + 2);
    assert!(BEGUN_AT_AT == FLAGS_AT + 6 && NAMES_AT == BEGUN_AT_AT + 8);
    // All names at their longest fit, and short ones stand in the first sector, which is written whole or not at all.
    assert!(NAMES_AT + 3 * ENTITY_NAME_SIZE_MAX <= HEADER_SIZE);
    assert!(ENTITY_NAME_SIZE_MAX <= u16::MAX as usize);
    assert!(MARK_CRC_AT == MARK_MAGIC.len() && MARK_SEGMENT_ID_AT == MARK_CRC_AT + 8);
};

/// What makes a batch the same batch, also after a crash: its blob has this name, however often it is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchId {
    /// UUIDv7 of the run of weir that began it.
    pub run: Uuid,
    /// Counts the batches of that core in that run, from 0.
    pub sequence: u64,
    pub core: u32,
}

impl BatchId {
    /// `<run>-c<core>-<sequence>.json.gz`. Names sort by the time of the run, then by core and sequence.
    pub fn blob_name(&self) -> String {
        let BatchId {
            run,
            sequence,
            core,
        } = self;
        format!("{run}-c{core}-{sequence:08}.json.gz")
    }

    /// The batch whose blob has this name, if it is one of weir's.
    pub fn of_blob_name(name: &str) -> Option<BatchId> {
        // The last one: a group of the UUID can begin with a c.
        let (run, rest) = name.strip_suffix(".json.gz")?.rsplit_once("-c")?;
        let (core, sequence) = rest.split_once('-')?;
        let id = BatchId {
            run: run.parse().ok()?,
            core: core.parse().ok()?,
            sequence: sequence.parse().ok()?,
        };
        (id.blob_name() == name).then_some(id)
    }
}

/// What a segment is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHeader<'a> {
    /// New for each use of the file.
    pub segment_id: u64,
    /// Bytes of the file: a shorter one was cut.
    pub segment_size: u64,
    pub batch: BatchId,
    pub database: Cow<'a, str>,
    pub table: Cow<'a, str>,
    /// Absent in version 1: then the configuration says how the table's rows are ingested.
    pub ingestion: Option<Ingestion<'a>>,
}

/// What the destination is told about the rows, besides where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ingestion<'a> {
    pub mapping: Option<Cow<'a, str>>,
    pub dedup: Dedup,
    /// When the batch got its first row, in milliseconds since 1970.
    pub begun_at_ms: u64,
}

/// Why bytes are not a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderFault {
    /// Never used: nothing but zeros where the magic would be.
    Blank,
    /// Written by a weir whose format this one does not read.
    Version(u32),
    /// Anything else.
    Damaged,
}

impl SegmentHeader<'_> {
    /// Writes the header to the start of `output`.
    fn write(&self, output: &mut [u8]) {
        let head = &mut output[..HEADER_SIZE];
        head.fill(0);
        let mut put = |at: usize, value: &[u8]| head[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(VERSION_AT, &VERSION.to_le_bytes());
        put(SEGMENT_ID_AT, &self.segment_id.to_le_bytes());
        put(SEGMENT_SIZE_AT, &self.segment_size.to_le_bytes());
        put(RUN_AT, self.batch.run.as_bytes());
        put(SEQUENCE_AT, &self.batch.sequence.to_le_bytes());
        put(CORE_AT, &self.batch.core.to_le_bytes());
        let (database, table) = (self.database.as_bytes(), self.table.as_bytes());
        put(DATABASE_SIZE_AT, &(database.len() as u16).to_le_bytes());
        put(TABLE_SIZE_AT, &(table.len() as u16).to_le_bytes());
        let ingestion = self.ingestion.as_ref();
        let ingestion = ingestion.expect("version 1 is only read");
        let mapping = ingestion.mapping.as_deref();
        let flags = match ingestion.dedup {
            Dedup::Off => 0,
            Dedup::IngestBy => FLAG_INGEST_BY,
        } | mapping.map_or(0, |_| FLAG_MAPPING);
        let mapping = mapping.unwrap_or_default().as_bytes();
        put(MAPPING_SIZE_AT, &(mapping.len() as u16).to_le_bytes());
        put(FLAGS_AT, &flags.to_le_bytes());
        put(BEGUN_AT_AT, &ingestion.begun_at_ms.to_le_bytes());
        put(NAMES_AT, database);
        put(NAMES_AT + database.len(), table);
        put(NAMES_AT + database.len() + table.len(), mapping);
        let crc = crc32(0, &head[SEGMENT_ID_AT..HEADER_SIZE]);
        head[HEADER_CRC_AT..SEGMENT_ID_AT].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads the first [`SEGMENT_HEADER_SIZE`] bytes of a segment, or as many as there are.
    pub fn decode(segment: &[u8]) -> Result<SegmentHeader<'static>, HeaderFault> {
        let head = segment.get(HEADER_AT..).unwrap_or_default();
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| head[at + byte]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| head[at + byte]));
        // A file whose making was cut off may be empty.
        if head.iter().take(VERSION_AT).all(|byte| *byte == 0) {
            return Err(HeaderFault::Blank);
        }
        let Some(magic) = head.get(..HEADER_CRC_AT) else {
            return Err(HeaderFault::Damaged);
        };
        if magic[..VERSION_AT] != MAGIC {
            return Err(HeaderFault::Damaged);
        }
        let version = u32_at(VERSION_AT);
        if !(VERSION_OLDEST..=VERSION).contains(&version) {
            return Err(HeaderFault::Version(version));
        }
        if head.len() < HEADER_SIZE
            || u32_at(HEADER_CRC_AT) != crc32(0, &head[SEGMENT_ID_AT..HEADER_SIZE])
        {
            return Err(HeaderFault::Damaged);
        }
        let u16_at = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
        let names_at = match version {
            1 => NAMES_AT_IN_VERSION_1,
            _ => NAMES_AT,
        };
        let name = |begin: usize, size: usize| {
            let bytes = head[names_at..HEADER_SIZE].get(begin..begin + size);
            let name = bytes.and_then(|bytes| std::str::from_utf8(bytes).ok());
            let name = name.map(|name| Cow::Owned(name.to_owned()));
            name.ok_or(HeaderFault::Damaged)
        };
        let (database_size, table_size) = (u16_at(DATABASE_SIZE_AT), u16_at(TABLE_SIZE_AT));
        let ingestion = match version {
            1 => None,
            _ => {
                let flags = u16_at(FLAGS_AT) as u16;
                let mapping = name(database_size + table_size, u16_at(MAPPING_SIZE_AT))?;
                Some(Ingestion {
                    mapping: (flags & FLAG_MAPPING != 0).then_some(mapping),
                    dedup: match flags & FLAG_INGEST_BY {
                        0 => Dedup::Off,
                        _ => Dedup::IngestBy,
                    },
                    begun_at_ms: u64_at(BEGUN_AT_AT),
                })
            }
        };
        Ok(SegmentHeader {
            segment_id: u64_at(SEGMENT_ID_AT),
            segment_size: u64_at(SEGMENT_SIZE_AT),
            batch: BatchId {
                run: Uuid::from_bytes(std::array::from_fn(|byte| head[RUN_AT + byte])),
                sequence: u64_at(SEQUENCE_AT),
                core: u32_at(CORE_AT),
            },
            database: name(0, database_size)?,
            table: name(database_size, table_size)?,
            ingestion,
        })
    }

    /// Whether the batch is one of `table`. A header of version 1 does not say how its rows are ingested.
    pub fn is_of(&self, table: &Table) -> bool {
        let same_names = table.database == self.database && table.table == self.table;
        same_names
            && self.ingestion.as_ref().is_none_or(|ingestion| {
                ingestion.mapping.as_deref() == table.mapping.as_deref()
                    && ingestion.dedup == table.dedup
            })
    }

    /// When the batch got its first row, in milliseconds since 1970; in version 1 when its run began, as its UUIDv7 says.
    pub fn begun_at_ms(&self) -> u64 {
        match &self.ingestion {
            Some(ingestion) => ingestion.begun_at_ms,
            None => self.batch.run.as_u64_pair().0 >> 16,
        }
    }
}

/// The first sector, once it says: the batch of `segment_id` is delivered, the file is free.
pub fn delivery_mark(segment_id: u64) -> [u8; SECTOR_SIZE] {
    let mut mark = [0; SECTOR_SIZE];
    mark[..MARK_CRC_AT].copy_from_slice(&MARK_MAGIC);
    let id = segment_id.to_le_bytes();
    mark[MARK_CRC_AT..MARK_CRC_AT + 4].copy_from_slice(&crc32(0, &id).to_le_bytes());
    mark[MARK_SEGMENT_ID_AT..MARK_SEGMENT_ID_AT + 8].copy_from_slice(&id);
    mark
}

/// Whether the head of a segment carries the mark of `segment_id`.
/// A damaged mark is none: the batch is then delivered once more, under the same name.
pub fn is_delivered(segment: &[u8], segment_id: u64) -> bool {
    segment.starts_with(&delivery_mark(segment_id))
}

/// A write that [`SegmentCursor::stage`] has laid out at the start of the frame buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameWrite {
    /// In the segment.
    pub offset: u64,
    pub size: usize,
    /// Bytes of the member that are in the segment once this is written.
    pub framed_size: usize,
}

/// How far a segment is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentCursor {
    segment_id: u64,
    segment_size: u64,
    index_next: u32,
    offset_next: u64,
    /// Bytes of the member that are in frames.
    framed_size: usize,
}

impl SegmentCursor {
    /// The cursor of a segment that nothing was written to in this use.
    pub fn new(segment_id: u64, segment_size: u64) -> Self {
        SegmentCursor {
            segment_id,
            segment_size,
            index_next: 0,
            offset_next: SEGMENT_HEADER_SIZE as u64,
            framed_size: 0,
        }
    }

    pub fn segment_id(&self) -> u64 {
        self.segment_id
    }

    pub fn segment_size(&self) -> u64 {
        self.segment_size
    }

    /// Bytes of the member that are in frames.
    pub fn framed_size(&self) -> usize {
        self.framed_size
    }

    /// Whether a member of up to `member_size` bytes still fits, whatever is being written now.
    pub fn fits(&self, member_size: usize) -> bool {
        let unframed = member_size.saturating_sub(self.framed_size);
        let whole = unframed / FRAME_PAYLOAD_SIZE_MAX * frame_size(FRAME_PAYLOAD_SIZE_MAX);
        let rest = frame_size(unframed % FRAME_PAYLOAD_SIZE_MAX);
        // A part may be on its way in a commit, and the rest goes into the next: a frame more, with its heads and padding.
        let split = 2 * SECTOR_SIZE;
        self.offset_next + (whole + rest + split) as u64 <= self.segment_size
    }

    /// Puts the next frame of `member`, which was flushed with these `totals`, into `buffer`.
    /// `flushed` are the totals of the flush before it. `header` makes the segment's header, for the first write.
    pub fn stage<'a>(
        &self,
        buffer: &mut [u8],
        member: &[u8],
        totals: Totals,
        flushed: Totals,
        header: impl FnOnce() -> SegmentHeader<'a>,
    ) -> FrameWrite {
        assert_eq!(member.len() as u64, totals.member_size);
        let payload_size = (member.len() - self.framed_size).min(FRAME_PAYLOAD_SIZE_MAX);
        assert!(payload_size > 0, "a frame without anything new");
        let framed_size = self.framed_size + payload_size;
        let payload = &member[self.framed_size..framed_size];
        let continued = framed_size < member.len();
        let frame = FrameHeader {
            segment_id: self.segment_id,
            index: self.index_next,
            continued,
            payload_size: payload_size as u32,
            payload_crc: payload_crc(payload),
            totals: Totals {
                member_size: framed_size as u64,
                ..if continued { flushed } else { totals }
            },
        };
        let (offset, head_size) = if self.index_next == 0 {
            header().write(buffer);
            (HEADER_AT as u64, HEADER_SIZE)
        } else {
            (self.offset_next, 0)
        };
        let size = head_size + write_frame(&mut buffer[head_size..], &frame, payload);
        assert!(
            offset + size as u64 <= self.segment_size,
            "a commit larger than what was reserved for it"
        );
        FrameWrite {
            offset,
            size,
            framed_size,
        }
    }

    /// The write is durable.
    pub fn advance(&mut self, write: &FrameWrite) {
        assert!(write.framed_size > self.framed_size, "a frame goes forward");
        self.index_next += 1;
        self.offset_next = write.offset + write.size as u64;
        self.framed_size = write.framed_size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::segment_size;

    fn header() -> SegmentHeader<'static> {
        SegmentHeader {
            segment_id: 0x0102_0304_0506_0708,
            segment_size: segment_size(65_536) as u64,
            batch: BatchId {
                run: Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_0000_0001),
                sequence: 12,
                core: 3,
            },
            database: "Telemetry".into(),
            table: "Events".into(),
            ingestion: Some(Ingestion {
                mapping: Some("events_v1".into()),
                dedup: Dedup::IngestBy,
                begun_at_ms: 1_763_888_400_000,
            }),
        }
    }

    fn written(header: &SegmentHeader<'_>) -> Vec<u8> {
        let mut bytes = vec![0xff; SEGMENT_HEADER_SIZE];
        header.write(&mut bytes[HEADER_AT..]);
        bytes
    }

    #[test]
    fn a_header_reads_back_with_names_of_any_length() {
        for size in [1, 9, 255, ENTITY_NAME_SIZE_MAX] {
            let mut header = header();
            header.database = "d".repeat(size).into();
            header.table = "t".repeat(size).into();
            let ingestion = header.ingestion.as_mut().unwrap();
            ingestion.mapping = Some("m".repeat(size).into());
            assert_eq!(SegmentHeader::decode(&written(&header)), Ok(header));
        }
    }

    #[test]
    fn no_single_flip_reads_as_a_header_of_this_version() {
        let bytes = written(&header());
        for bit in HEADER_AT * 8..SEGMENT_HEADER_SIZE * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let fault = SegmentHeader::decode(&flipped).expect_err("one bit is wrong");
            let version = HEADER_AT + VERSION_AT..HEADER_AT + HEADER_CRC_AT;
            let version = version.contains(&(bit / 8));
            assert_eq!(matches!(fault, HeaderFault::Version(_)), version, "{bit}");
        }
        for size in 0..SEGMENT_HEADER_SIZE {
            assert!(SegmentHeader::decode(&bytes[..size]).is_err());
        }
        assert_eq!(
            SegmentHeader::decode(&[0; SEGMENT_HEADER_SIZE]),
            Err(HeaderFault::Blank)
        );
    }

    #[test]
    fn a_mark_is_for_one_use_of_the_file() {
        let mut bytes = written(&header());
        assert!(!is_delivered(&bytes, header().segment_id));
        bytes[..HEADER_AT].copy_from_slice(&delivery_mark(header().segment_id));
        assert!(is_delivered(&bytes, header().segment_id));
        assert!(!is_delivered(&bytes, header().segment_id + 1));
        assert!(SegmentHeader::decode(&bytes).is_ok(), "beside the header");
        bytes[0] ^= 1;
        assert!(!is_delivered(&bytes, header().segment_id));
    }

    #[test]
    fn the_names_of_blobs_sort_as_they_came() {
        let name = |sequence| {
            BatchId {
                sequence,
                ..header().batch
            }
            .blob_name()
        };
        assert_eq!(
            name(12),
            "01920000-0000-7000-8000-000000000001-c3-00000012.json.gz"
        );
        assert!(name(9) < name(10));
    }

    #[test]
    fn a_blobs_name_reads_back_whatever_is_in_the_run() {
        let runs = [
            0x0192_0000_0000_7000_8000_0000_0000_0001,
            0x01a2_0dc0_55c0_75a4_891c_ca79_be91_4a40,
            0xcccc_cccc_cccc_7ccc_cccc_cccc_cccc_cccc,
        ];
        for run in runs {
            let id = BatchId {
                run: Uuid::from_u128(run),
                sequence: 123_456_789,
                core: 12,
            };
            assert_eq!(BatchId::of_blob_name(&id.blob_name()), Some(id));
        }
        let good = header().batch.blob_name();
        for name in [
            good.replace("c3", "c03"),
            good.replace(".json.gz", ".json"),
            good.replace("-c3", "/c3"),
            format!("../{good}"),
            good.to_uppercase(),
            String::new(),
        ] {
            assert_eq!(BatchId::of_blob_name(&name), None, "{name}");
        }
    }

    #[test]
    fn what_fits_can_be_staged_in_as_many_frames_as_it_takes() {
        let segment_size = segment_size(4 * FRAME_PAYLOAD_SIZE_MAX) as u64;
        let member = vec![7; 4 * FRAME_PAYLOAD_SIZE_MAX];
        let mut buffer = vec![0; crate::limits::FRAME_BUFFER_SIZE];
        for step in [
            1_000,
            FRAME_PAYLOAD_SIZE_MAX - 1,
            FRAME_PAYLOAD_SIZE_MAX,
            member.len(),
        ] {
            let mut cursor = SegmentCursor::new(1, segment_size);
            let mut frame_count = 0;
            let mut end = 0;
            while end < member.len() && cursor.fits((end + step).min(member.len())) {
                end = (end + step).min(member.len());
                let totals = Totals {
                    member_size: end as u64,
                    ..Totals::default()
                };
                while cursor.framed_size() < end {
                    let write = cursor.stage(&mut buffer, &member[..end], totals, totals, header);
                    cursor.advance(&write);
                    frame_count += 1;
                }
            }
            assert_eq!(cursor.index_next, frame_count);
            assert!(cursor.offset_next <= segment_size);
            // Small commits use the room for heads up first; large ones fit whole.
            assert_eq!(end == member.len(), step > 1_000, "{step}");
        }
    }
}
