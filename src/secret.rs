//! Secrets: what must never be printed, and URLs that carry one in their query.
//!
//! Before it: the configuration names where a secret is; the service returns URLs with a signature.
//! After it: [`crate::uplink::kusto`] puts it into a request.
//! Thread: the uplink's runtime, and the main thread at start. Allocates: for each secret read.
//! Invariant: the content leaves these types only through a method called `expose`, and its memory is zeroed when it
//! is given back. No type here has `Serialize`, and what they print does not depend on the content of the secret.
//! Not here: encryption; a secret is plain in memory while it is in use, also in the HTTP client's own copy of a request.

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

    /// The content. Give it to what sends it, and to nothing that formats.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// Where a secret is: the configuration holds this, and the content is read each time it is needed, so that a
/// rotated file is seen without a restart.
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

/// A storage URL whose query is a shared access signature: whoever has it may write.
///
/// The signature is kept byte for byte: decoding and encoding it again breaks it.
/// Prints as `https://account.blob.core.windows.net/container?<sas redacted>`.
#[derive(Clone, PartialEq, Eq)]
pub struct SasUrl {
    /// Scheme, authority and path.
    place: String,
    sas: Secret,
}

impl SasUrl {
    /// Splits at the query. The caller has checked that `url` is one.
    pub fn new(url: &str) -> Self {
        let (place, query) = url.split_once('?').unwrap_or((url, ""));
        // Whoever follows the rules of URLs puts no fragment here; if one came, it is as secret as what is before it.
        SasUrl {
            place: place.trim_end_matches('/').to_owned(),
            sas: Secret::new(query),
        }
    }

    /// Scheme, authority and path, without the signature: safe to print.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The URL of something below this one, under the same signature. `name` is URL-safe.
    pub fn join(&self, name: &str) -> Self {
        SasUrl {
            place: format!("{}/{name}", self.place),
            sas: self.sas.clone(),
        }
    }

    /// The whole URL.
    pub fn expose(&self) -> Zeroizing<String> {
        Zeroizing::new(match self.sas.expose() {
            "" => self.place.clone(),
            sas => format!("{}?{sas}", self.place),
        })
    }

    /// When the signature ends, as the service wrote it into the field `se`; nothing where there is none.
    pub fn expires_at(&self) -> Option<jiff::Timestamp> {
        let url = reqwest::Url::parse(&self.expose()).ok()?;
        let (_, expiry) = url.query_pairs().find(|(key, _)| key == "se")?;
        expiry.parse().ok()
    }
}

impl fmt::Display for SasUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        match self.sas.expose() {
            "" => Ok(()),
            _ => f.write_str("?<sas redacted>"),
        }
    }
}

impl fmt::Debug for SasUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
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

    #[test]
    fn a_signature_is_kept_byte_for_byte() {
        let text = "https://a.blob.core.windows.net/c?sv=2023&se=2026-11-25T10%3A00%3A00Z&sig=a%2Bb+c%2f%3D";
        let url = SasUrl::new(text);
        assert_eq!(*url.expose(), text);
        assert_eq!(
            url.to_string(),
            "https://a.blob.core.windows.net/c?<sas redacted>"
        );
        assert_eq!(*url.join("b").expose(), text.replace("/c?", "/c/b?"));
        assert_eq!(
            url.expires_at(),
            Some("2026-11-25T10:00:00Z".parse().unwrap())
        );
        assert_eq!(SasUrl::new("http://127.0.0.1:1/a/c").expires_at(), None);
    }

    proptest! {
        #[test]
        fn no_query_is_ever_printed(place in "https://[a-z]{1,9}/[a-z/]{0,9}", query in "[ -~]{1,600}") {
            // Long enough that it can't be a part of the rest by chance.
            let query = format!("sig=canary{query}");
            let url = SasUrl::new(&format!("{place}?{query}"));
            let joined = url.join("blob.json.gz");
            for text in [format!("{url}"), format!("{url:?}"), format!("{joined:#?}")] {
                prop_assert!(!text.contains("canary"));
                prop_assert!(text.ends_with("?<sas redacted>"));
            }
            prop_assert!(url.expose().ends_with(&query));
            prop_assert!(joined.expose().ends_with(&query));
        }
    }
}
