//! The directory destination: `<path>/<database>/<table>/<blob>.json.gz`.
//!
//! Before it: [`crate::uplink`] has a batch for a table.
//! After it: the blob is on disk under its name.
//! Thread: a blocking thread of the uplink's runtime. Allocates: names and handles.
//! Invariant: a name appears when its content is complete and synced, so a reader never sees a part of a blob. A batch
//! that is delivered again replaces itself, as its name is its own.
//! Not here: retries; the uplink makes them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::config::Table;
use crate::error::Fatal;
use crate::upload_buffer::Batch;

/// One directory per table.
pub struct Directory {
    tables: Vec<PathBuf>,
}

impl Directory {
    /// Makes the tables' directories and proves that files can be made in them; where that fails it is only said if the
    /// destination `may_be_away`.
    pub fn open(root: &Path, tables: &[Table], may_be_away: bool) -> Result<Self, Fatal> {
        let mut paths = Vec::with_capacity(tables.len());
        for table in tables {
            let path = root.join(&table.database).join(&table.table);
            // One name for every start, so that one that was killed here leaves nothing for ever.
            let probe = path.join(".weir.probe");
            let ready = fs::create_dir_all(&path)
                .and_then(|()| File::create(&probe))
                .and_then(|_| match fs::remove_file(&probe) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                })
                .map_err(|source| Fatal::DirectoryNotWritable {
                    path: path.clone(),
                    source,
                });
            match ready {
                Err(fatal) if may_be_away => tracing::error!("{fatal}; batches stay in the spool"),
                ready => ready?,
            }
            paths.push(path);
        }
        Ok(Directory { tables: paths })
    }

    /// Puts the batch under its name, with the content that `write` makes. May be called again for the same batch.
    pub fn write(
        &self,
        batch: &Batch,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<()> {
        let directory = &self.tables[batch.table_index];
        // It may have been away at start.
        fs::create_dir_all(directory)?;
        let name = batch.id.blob_name();
        let partial = directory.join(format!(".{name}.partial"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&partial)?;
        write(&mut file)?;
        file.sync_data()?;
        drop(file);
        fs::rename(&partial, directory.join(&name))?;
        // The new name is as durable as the content only once the directory is synced.
        File::open(directory)?.sync_all()
    }
}
