//! Secrets: what must never be printed.
//!
//! Before it: the configuration names where a secret is.
//! After it: [`crate::admission`] makes hashes and keys of it.
//! Thread: the main thread, at start. Allocates: for each secret read.
//! Invariant: the content leaves these types only through a method called `expose`, and its memory is zeroed when it
//! is given back. No type here has `Serialize`, and what they print does not depend on the content of the secret.
//! Not here: encryption; a secret is plain in memory while it is in use.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::limits::SECRET_SIZE_MAX;

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Secret(Zeroizing::new(text.into()))
    }

    /// The content. Give it to what needs it, and to nothing that formats.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// Where a secret is: the configuration holds this, and the content is read when it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// The name of an environment variable.
    Env(String),
    File(PathBuf),
}

/// Why a secret could not be read; says where it was looked for and never what was found.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error(
        "the environment variable {0} is not set; set it, or name another one in the configuration"
    )]
    NotSet(String),
    #[error("cannot read the secret in {}: {source}; check the path and who may read it", path.display())]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{0} holds no secret: it is empty, longer than 64 KiB or not UTF-8")]
    Content(String),
}

const _: () = assert!(
    SECRET_SIZE_MAX == 64 * 1024,
    "the message above names this number"
);

impl SecretSource {
    /// Reads the secret, without the white space around it: editors and `echo` end files with a newline.
    pub fn read(&self) -> Result<Secret, SecretError> {
        match self {
            SecretSource::Env(name) => {
                let value =
                    std::env::var_os(name).ok_or_else(|| SecretError::NotSet(name.clone()))?;
                let text = value.into_string().ok();
                checked(text.map(Zeroizing::new), name.clone())
            }
            SecretSource::File(path) => Self::read_file(path),
        }
    }

    fn read_file(path: &Path) -> Result<Secret, SecretError> {
        let unreadable = |source| SecretError::Unreadable {
            path: path.into(),
            source,
        };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        // Of the full size from the start: a buffer that grows leaves unzeroed copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(SECRET_SIZE_MAX + 1));
        file.take(SECRET_SIZE_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        let text = std::str::from_utf8(&bytes).ok();
        checked(
            text.map(|text| Zeroizing::new(text.to_owned())),
            path.display().to_string(),
        )
    }
}

fn checked(text: Option<Zeroizing<String>>, origin: String) -> Result<Secret, SecretError> {
    let text = text.ok_or_else(|| SecretError::Content(origin.clone()))?;
    let trimmed = text.trim();
    if trimmed.is_empty() || text.len() > SECRET_SIZE_MAX {
        return Err(SecretError::Content(origin));
    }
    Ok(Secret::new(trimmed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_secret_prints_nothing_of_itself() {
        let secret = Secret::new("canary");
        assert_eq!(
            format!("{secret:?} {:?}", Some(&secret)).find("canary"),
            None
        );
        assert_eq!(secret.expose(), "canary");
    }

    #[test]
    fn a_file_is_trimmed_and_bounded() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let source = SecretSource::File(file.path().into());
        assert!(matches!(source.read(), Err(SecretError::Content(_))));
        file.write_all(b" canary \r\n").unwrap();
        assert_eq!(source.read().unwrap().expose(), "canary");
        file.write_all(&vec![b'x'; SECRET_SIZE_MAX]).unwrap();
        let error = source.read().unwrap_err().to_string();
        assert!(
            !error.contains("xxx") && error.contains("64 KiB"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_there_is_named() {
        let missing = SecretSource::File("no/such/file".into());
        assert!(
            missing
                .read()
                .unwrap_err()
                .to_string()
                .contains("no/such/file")
        );
        let unset = SecretSource::Env("WEIR_TEST_NO_SUCH_VARIABLE".into());
        let error = unset.read().unwrap_err().to_string();
        assert!(error.contains("WEIR_TEST_NO_SUCH_VARIABLE"), "{error}");
    }
}
