//! `weir spool`: what is in the spool's directory, for people. It only reads, also beside a running weir.
//!
//! A segment that is filled at the moment may show a commit in progress as torn; asked again it is whole.

use std::fmt::Write as _;
use std::io::Write;

use zlib_rs::{Inflate, InflateFlush, Status};

use super::{SpoolCommand, print};
use crate::config::Size;
use crate::error::Fatal;
use crate::limits::{FRAME_BUFFER_SIZE, GZIP_HEADER_SIZE};
use crate::spool::disk::{Directory, Disk, Found};
use crate::spool::frame::Totals;
use crate::spool::reader::{Contents, SegmentReader, Tail};
use crate::spool::recover::{State, state_of};
use crate::spool::segment::SegmentHeader;

pub(super) fn run(command: &SpoolCommand) -> Result<(), Fatal> {
    match command {
        SpoolCommand::Ls(args) => ls(&Observed::of(&args.load()?.spool.directory)?),
        SpoolCommand::Verify(args) => verify(&Observed::of(&args.load()?.spool.directory)?),
        SpoolCommand::Cat { config, segment } => {
            cat(&Observed::of(&config.load()?.spool.directory)?, segment)
        }
    }
}

/// A spool that is looked at.
struct Observed {
    disk: Directory,
    /// In the order of their numbers.
    segments: Vec<Found>,
    path: std::path::PathBuf,
}

impl Observed {
    fn of(path: &std::path::Path) -> Result<Observed, Fatal> {
        let disk = Directory::observe(path);
        let mut segments = disk.list().map_err(|source| Fatal::SpoolUnusable {
            path: path.to_owned(),
            source,
        })?;
        segments.sort_by_key(|found| (found.slot, found.quarantined));
        Ok(Observed {
            disk,
            segments,
            path: path.to_owned(),
        })
    }

    fn unreadable(&self, found: Found) -> impl FnOnce(std::io::Error) -> Fatal + use<> {
        let path = self.path.join(name(found));
        move |source| Fatal::Io {
            action: format!("reading {}", path.display()),
            source,
        }
    }

    fn state(&self, found: Found) -> Result<State, Fatal> {
        state_of(&self.disk, found).map_err(self.unreadable(found))
    }

    /// The header of a segment, also of one that is put aside or delivered.
    fn header(&self, found: Found) -> Result<Option<SegmentHeader<'static>>, Fatal> {
        let mut head = [0; crate::limits::SEGMENT_HEADER_SIZE];
        let read = self.disk.read(found, &mut head, 0);
        let size = read.map_err(self.unreadable(found))?;
        Ok(SegmentHeader::decode(&head[..size]).ok())
    }

    fn contents(
        &self,
        found: Found,
        header: &SegmentHeader<'_>,
        window: &mut [u8],
    ) -> Result<Contents, Fatal> {
        SegmentReader::new(&self.disk, found, header.segment_id, window)
            .contents(header)
            .map_err(self.unreadable(found))
    }
}

fn name(found: Found) -> String {
    if found.quarantined {
        found.slot.quarantine_name()
    } else {
        found.slot.file_name()
    }
}

fn state_name(state: &State) -> &'static str {
    match state {
        State::Free => "free",
        State::Pending(_) => "pending",
        State::Damaged => "damaged",
        State::Version(_) => "other version",
        State::Quarantined => "quarantined",
    }
}

/// One line per segment that is not free, and a line that counts all.
fn ls(spool: &Observed) -> Result<(), Fatal> {
    let mut text = String::new();
    let mut free_count = 0;
    for found in &spool.segments {
        let state = spool.state(*found)?;
        if state == State::Free {
            free_count += 1;
            continue;
        }
        let held = match spool.header(*found)? {
            Some(SegmentHeader {
                batch,
                database,
                table,
                ..
            }) => format!("{database}.{table}  {}", batch.blob_name()),
            None => "-".into(),
        };
        let state = state_name(&state);
        writeln!(text, "{:<20}  {state:<13}  {held}", name(*found)).expect("writing to a string");
    }
    let size: u64 = spool.segments.iter().map(|found| found.size).sum();
    let count = spool.segments.len();
    writeln!(
        text,
        "{count} segments, {:.2}; {free_count} free",
        Size(size)
    )
    .expect("writing to a string");
    print(&text)
}

/// Reads every frame; fails where a row is lost that had been durable.
fn verify(spool: &Observed) -> Result<(), Fatal> {
    let mut window = vec![0; FRAME_BUFFER_SIZE];
    let mut damaged_count = 0;
    let mut sum = (0, 0);
    for found in &spool.segments {
        let state = spool.state(*found)?;
        if state == State::Free {
            continue;
        }
        let verdict = match spool.header(*found)? {
            None => {
                damaged_count += 1;
                format!("{}: its header cannot be read", state_name(&state))
            }
            Some(header) => {
                let contents = spool.contents(*found, &header, &mut window)?;
                sum.0 += contents.totals.row_count;
                sum.1 += contents.totals.raw_size;
                let behind = match contents.tail {
                    Tail::Clean => "ok".into(),
                    Tail::Torn { row_count } => format!(
                        "ok; behind them a commit of {row_count} rows that did not get to the disk whole"
                    ),
                    Tail::Corrupt { row_count } => {
                        damaged_count += 1;
                        format!("DAMAGED: {row_count} rows behind them cannot be read")
                    }
                };
                format!(
                    "{} frames, {} rows: {behind}",
                    contents.frame_count, contents.totals.row_count
                )
            }
        };
        print(&format!("{:<20}  {verdict}\n", name(*found)))?;
    }
    print(&format!(
        "{} rows, {:.2} before compression\n",
        sum.0,
        Size(sum.1)
    ))?;
    if damaged_count > 0 {
        return Err(Fatal::SpoolDamaged { damaged_count });
    }
    Ok(())
}

/// Prints the rows of one segment, as far as they are whole.
fn cat(spool: &Observed, segment: &str) -> Result<(), Fatal> {
    let no_segment = || Fatal::NoSegment {
        segment: segment.into(),
        path: spool.path.clone(),
    };
    let named = |found: &&Found| name(**found) == segment;
    let found = *spool.segments.iter().find(named).ok_or_else(no_segment)?;
    let header = spool.header(found)?.ok_or_else(no_segment)?;
    let mut window = vec![0; FRAME_BUFFER_SIZE];
    let Contents { totals, .. } = spool.contents(found, &header, &mut window)?;
    let mut reader = SegmentReader::new(&spool.disk, found, header.segment_id, &mut window);
    let mut rows = Rows::new(totals);
    let mut stdout = std::io::stdout().lock();
    let copied = reader.copy_member(&totals, &mut rows.to(&mut stdout));
    match copied.and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(spool.unreadable(found)(error))
        }
        _ => Ok(()),
    }
}

/// Inflates a gzip member that is written to it in pieces.
struct Rows {
    inflate: Inflate,
    header_left: usize,
    raw_left: u64,
    piece: Vec<u8>,
}

struct RowsTo<'a, W> {
    rows: &'a mut Rows,
    output: &'a mut W,
}

impl Rows {
    fn new(totals: Totals) -> Rows {
        Rows {
            // The member's own checksum is not read: every frame's was.
            inflate: Inflate::new(false, 15),
            header_left: GZIP_HEADER_SIZE,
            raw_left: totals.raw_size,
            piece: vec![0; 64 << 10],
        }
    }

    fn to<'a, W>(&'a mut self, output: &'a mut W) -> RowsTo<'a, W> {
        RowsTo { rows: self, output }
    }
}

impl<W: Write> Write for RowsTo<'_, W> {
    fn write(&mut self, member: &[u8]) -> std::io::Result<usize> {
        let rows = &mut *self.rows;
        let skipped = rows.header_left.min(member.len());
        rows.header_left -= skipped;
        let mut rest = &member[skipped..];
        while rows.raw_left > 0 && !rest.is_empty() {
            let (in_before, out_before) = (rows.inflate.total_in(), rows.inflate.total_out());
            let status = rows
                .inflate
                .decompress(rest, &mut rows.piece, InflateFlush::NoFlush)
                .map_err(|error| {
                    std::io::Error::new(std::io::ErrorKind::InvalidData, error.as_str())
                })?;
            let made = (rows.inflate.total_out() - out_before) as usize;
            rest = &rest[(rows.inflate.total_in() - in_before) as usize..];
            rows.raw_left -= made as u64;
            self.output.write_all(&rows.piece[..made])?;
            if status == Status::StreamEnd {
                break;
            }
        }
        Ok(member.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.output.flush()
    }
}
