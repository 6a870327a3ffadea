//! Damaged segments: cut at every byte, and with every bit of their last frames flipped.
//!
//! Whatever happened to a segment, what comes out of it is a prefix of the rows that went in, and what does not come out
//! is detected and counted.

mod support;

use std::io::Read;

use support::sim_disk::{Random, SimDisk};
use uuid::Uuid;
use weir::deflate::GzipMember;
use weir::limits::{FRAME_BUFFER_SIZE, FRAME_HEADER_SIZE, SEGMENT_HEADER_SIZE, segment_size};
use weir::spool::disk::{Found, Slot};
use weir::spool::frame::Totals;
use weir::spool::reader::{Contents, SegmentReader, Tail};
use weir::spool::recover::{State, state_of};
use weir::spool::segment::{BatchId, HEADER_AT, SegmentCursor, SegmentHeader};

const FRAME_COUNT: u64 = 5;
const BUFFER_SIZE: usize = 16 * 1024;

/// A segment, and what is in it.
struct Written {
    bytes: Vec<u8>,
    header: SegmentHeader<'static>,
    rows: Vec<String>,
    /// Where each frame begins, and where the last ends.
    frame_offsets: Vec<usize>,
    /// Rows up to the end of each frame.
    frame_rows: Vec<u64>,
}

fn written() -> Written {
    let mut random = Random::new(7);
    let size = segment_size(BUFFER_SIZE) as u64;
    let header = SegmentHeader {
        segment_id: 42,
        segment_size: size,
        batch: BatchId {
            run: Uuid::from_u128(1),
            sequence: 0,
            core: 0,
        },
        database: "D".into(),
        table: "T".into(),
    };
    let mut memory = vec![0; BUFFER_SIZE];
    let mut member = GzipMember::new(2);
    member.open(&mut memory);
    let mut cursor = SegmentCursor::new(header.segment_id, size);
    let mut frame = vec![0; FRAME_BUFFER_SIZE];
    let mut written = Written {
        bytes: vec![0; size as usize],
        header,
        rows: Vec::new(),
        frame_offsets: Vec::new(),
        frame_rows: Vec::new(),
    };
    let mut durable = Totals::default();
    for index in 0..FRAME_COUNT {
        for _ in 0..3 + index {
            let filler: String = (0..120)
                .map(|_| char::from(b'a' + random.below(26) as u8))
                .collect();
            let row = format!("{}-{filler}", written.rows.len());
            member.append(&mut memory, format!("{row}\n").as_bytes());
            written.rows.push(row);
        }
        member.flush(&mut memory);
        let totals = Totals {
            member_size: member.size() as u64,
            raw_size: member.raw_size(),
            raw_crc: member.raw_crc(),
            row_count: written.rows.len() as u64,
        };
        let header = || written.header.clone();
        let write = cursor.stage(
            &mut frame,
            &memory[..member.size()],
            totals,
            durable,
            header,
        );
        let at = write.offset as usize;
        written.bytes[at..at + write.size].copy_from_slice(&frame[..write.size]);
        written.frame_offsets.push(at.max(SEGMENT_HEADER_SIZE));
        written.frame_rows.push(totals.row_count);
        cursor.advance(&write);
        durable = totals;
        if index + 1 == FRAME_COUNT {
            written.frame_offsets.push(at + write.size);
        }
    }
    written
}

/// What is read of `bytes`: the state of the file and, where it holds a batch, its contents and its rows.
fn read(bytes: Vec<u8>) -> (State, Option<(Contents, Vec<String>)>) {
    let found = Found {
        slot: Slot(0),
        size: bytes.len() as u64,
        quarantined: false,
    };
    let disk = SimDisk::new(0);
    disk.be_good();
    disk.put(found.slot, bytes);
    let state = state_of(&disk, found).unwrap();
    let State::Pending(header) = &state else {
        return (state, None);
    };
    let mut window = vec![0; FRAME_BUFFER_SIZE];
    let reader = SegmentReader::new(&disk, found, header.segment_id, &mut window);
    let contents = reader.contents(header).unwrap();
    let mut blob = Vec::new();
    SegmentReader::new(&disk, found, header.segment_id, &mut window)
        .copy_member(&contents.totals, &mut blob)
        .unwrap();
    let mut text = String::new();
    if contents.totals.row_count > 0 {
        let mut decoder = flate2::bufread::GzDecoder::new(blob.as_slice());
        decoder.read_to_string(&mut text).unwrap();
        assert!(decoder.into_inner().is_empty(), "bytes after the member");
    }
    let rows = text.lines().map(str::to_owned).collect();
    (state, Some((contents, rows)))
}

#[test]
fn a_whole_segment_reads_back() {
    let written = written();
    let (state, contents) = read(written.bytes.clone());
    assert_eq!(state, State::Pending(written.header.clone()));
    let (contents, rows) = contents.unwrap();
    assert_eq!(rows, written.rows);
    assert_eq!(contents.tail, Tail::Clean);
    assert_eq!(u64::from(contents.frame_count), FRAME_COUNT);
}

#[test]
fn a_segment_cut_at_any_byte_yields_its_whole_frames_and_says_that_it_was_cut() {
    let written = written();
    let end = *written.frame_offsets.last().unwrap();
    for size in 0..end {
        let (state, contents) = read(written.bytes[..size].to_vec());
        let Some((contents, rows)) = contents else {
            // Without its header: nothing but zeros is a file that was never used, anything else is put aside.
            assert!(size < SEGMENT_HEADER_SIZE);
            let blank = written.bytes[..size].iter().all(|byte| *byte == 0);
            assert_eq!(state, if blank { State::Free } else { State::Damaged });
            continue;
        };
        let whole = written.frame_offsets[1..]
            .iter()
            .filter(|end| **end <= size)
            .count();
        let row_count = whole
            .checked_sub(1)
            .map_or(0, |last| written.frame_rows[last]);
        assert_eq!(rows, written.rows[..row_count as usize], "cut at {size}");
        let Tail::Corrupt { row_count: lost } = contents.tail else {
            panic!("cut at {size}: {:?}", contents.tail);
        };
        // A frame whose header is left is counted; of those behind it nothing is known.
        let header_left = size >= written.frame_offsets[whole] + FRAME_HEADER_SIZE;
        let expected = if header_left {
            written.frame_rows[whole] - row_count
        } else {
            0
        };
        assert_eq!(lost, expected, "cut at {size}");
    }
}

#[test]
fn any_flipped_bit_in_the_last_two_frames_costs_at_most_its_frame_and_is_counted() {
    let written = written();
    let [.., begin, last, end] = written.frame_offsets[..] else {
        panic!("too few frames");
    };
    let total = written.rows.len() as u64;
    let (mut lost_count, mut kept_count) = (0, 0);
    for bit in begin * 8..end * 8 {
        let mut bytes = written.bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let (_, contents) = read(bytes);
        let (contents, rows) = contents.expect("the header is whole");
        assert_eq!(rows, written.rows[..rows.len()], "bit {bit}");
        let frame = if bit / 8 < last {
            FRAME_COUNT - 2
        } else {
            FRAME_COUNT - 1
        } as usize;
        let lost = match contents.tail {
            Tail::Clean => 0,
            Tail::Torn { row_count } => {
                assert_eq!(
                    frame as u64,
                    FRAME_COUNT - 1,
                    "bit {bit}: the last frame alone can be torn"
                );
                row_count
            }
            Tail::Corrupt { row_count } => {
                assert_eq!(
                    frame as u64,
                    FRAME_COUNT - 2,
                    "bit {bit}: a later frame shows the damage"
                );
                row_count
            }
        };
        assert_eq!(rows.len() as u64 + lost, total, "bit {bit}");
        if lost > 0 {
            assert_eq!(
                rows.len() as u64,
                written.frame_rows[frame - 1],
                "bit {bit}"
            );
            lost_count += 1;
        } else {
            kept_count += 1;
        }
    }
    // Every bit of a payload matters, and none of the header, which is there twice, nor of the padding.
    assert!(
        lost_count > 4_000 && kept_count > 2 * 2 * 64 * 8,
        "{lost_count} {kept_count}"
    );
}

#[test]
fn a_flipped_bit_in_the_header_is_put_aside_and_never_misread() {
    let written = written();
    for bit in HEADER_AT * 8..SEGMENT_HEADER_SIZE * 8 {
        let mut bytes = written.bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let (state, _) = read(bytes);
        assert!(
            matches!(state, State::Damaged | State::Version(_)),
            "bit {bit}: {state:?}"
        );
    }
}

#[test]
fn frames_of_an_earlier_use_are_never_taken_for_this_one() {
    let mut written = written();
    // A new use of the file: only its first commit, over the old one's frames.
    let mut header = written.header.clone();
    header.segment_id += 1;
    let mut memory = vec![0; BUFFER_SIZE];
    let mut member = GzipMember::new(2);
    member.open(&mut memory);
    member.append(&mut memory, b"new\n");
    member.flush(&mut memory);
    let totals = Totals {
        member_size: member.size() as u64,
        raw_size: member.raw_size(),
        raw_crc: member.raw_crc(),
        row_count: 1,
    };
    let cursor = SegmentCursor::new(header.segment_id, header.segment_size);
    let mut frame = vec![0; FRAME_BUFFER_SIZE];
    let member = &memory[..member.size()];
    let write = cursor.stage(&mut frame, member, totals, Totals::default(), || {
        header.clone()
    });
    let at = write.offset as usize;
    written.bytes[at..at + write.size].copy_from_slice(&frame[..write.size]);
    let (contents, rows) = read(written.bytes).1.unwrap();
    assert_eq!(rows, ["new"]);
    assert_eq!(contents.tail, Tail::Clean);
}
