//! Certificates and keys from PEM files.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{InconsistentKeys, RootCertStore, crypto::CryptoProvider, sign::CertifiedKey};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject, SectionKind},
};

use super::{TlsError, go_chain};

/// Maximum size of a file with certificates, a key or a token, in bytes. The CA bundles of
/// distributions have a tenth of it.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Maximum length of a block's label, in bytes; those of certificates and keys are shorter.
const MAX_LABEL: usize = 32;
/// What some editors write before a text, and PEM does not know.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads a whole regular file of at most 4 MiB, without a byte order mark. It blocks, but never waits for another process, as
/// a named pipe would.
///
/// # Errors
/// When the file cannot be read, is not a regular file, or is larger.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let nonblocking = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let file: File = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut contents = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES / 1024 / 1024;
        return Err(io::Error::other(format!("it is larger than {limit} MiB")));
    }
    if contents.starts_with(BYTE_ORDER_MARK) {
        contents.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(contents)
}

/// Why a PEM text cannot be parsed, for people; `thing` is what was looked for. It quotes nothing
/// but the label of a block: where line breaks are missing, a line holds the key itself.
pub fn pem_fault(error: &pem::Error, thing: &str) -> String {
    match error {
        pem::Error::NoItemsFound => format!("holds no {thing}"),
        pem::Error::MissingSectionEnd { end_marker } => {
            let is_label = |byte: &u8| byte.is_ascii_uppercase() || *byte == b' ';
            let is_label = end_marker.len() <= MAX_LABEL && end_marker.iter().all(is_label);
            match str::from_utf8(end_marker).ok().filter(|_| is_label) {
                Some(label) => format!("the block {label} has no end, the file is cut off"),
                None => "a block has no end, or line breaks are missing".into(),
            }
        }
        pem::Error::IllegalSectionStart { .. } => {
            "a line BEGIN does not end in five hyphens, or line breaks are missing".into()
        }
        error => error.to_string(),
    }
}

/// What to do about a key with a password.
const WITHOUT_PASSWORD: &str = "; write it without, as openssl pkey -in FILE does";

/// [`pem_fault`], and where nothing was found, what the text holds instead.
pub fn pem_fault_of(error: &pem::Error, thing: &str, text: &[u8]) -> String {
    let holds = |label: &[u8]| text.windows(label.len()).any(|window| window == label);
    // The older form of a key with a password has headers, which are no base64.
    let fault = match error {
        pem::Error::Base64Decode(_) if holds(b"Proc-Type: 4,ENCRYPTED") => {
            return format!("holds no {thing}, but one with a password{WITHOUT_PASSWORD}");
        }
        error => pem_fault(error, thing),
    };
    let pem::Error::NoItemsFound = error else { return fault };
    let is_certificate = thing == "certificate";
    let instead = if holds(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") {
        return format!("{fault}, but one with a password{WITHOUT_PASSWORD}");
    } else if is_certificate && holds(b"PRIVATE KEY-----") {
        ", but a private key; are the files of certificate and key swapped?"
    } else if !is_certificate && holds(b"-----BEGIN CERTIFICATE-----") {
        ", but a certificate; are the files of certificate and key swapped?"
    } else if holds(b"-----BEGIN CERTIFICATE REQUEST-----") {
        ", but a request for one, which a CA has to sign"
    } else if text.is_empty() {
        "; it is empty"
    } else {
        "; it must be PEM, with lines -----BEGIN …-----"
    };
    fault + instead
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    read_file(path).map_err(|source| TlsError::Read { path: path.into(), source })
}

/// A certificate chain, leaf first, and its private key.
#[derive(Debug)]
pub struct Identity {
    /// The chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key, in PKCS#1, SEC1 or PKCS#8.
    pub key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads a chain and a key from two PEM files.
    ///
    /// # Errors
    /// When either cannot be read or holds no such thing.
    pub fn from_pem_files(chain: &Path, key: &Path) -> Result<Self, TlsError> {
        let key_pem = read(key)?;
        Self::from_pem((chain, &read(chain)?), (key, &key_pem))
    }

    /// Parses a chain and a key; the paths are named in errors.
    ///
    /// # Errors
    /// When either is malformed or holds no such thing.
    pub fn from_pem(chain: (&Path, &[u8]), key: (&Path, &[u8])) -> Result<Self, TlsError> {
        let (key_path, key_pem) = key;
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| TlsError::Pem {
            path: key_path.into(),
            reason: pem_fault_of(&error, "private key", key_pem),
        })?;
        Ok(Self { chain: parse_chain(chain.0, chain.1)?, key })
    }

    /// The chain with its key, ready to sign.
    ///
    /// # Errors
    /// When the key is not the leaf's, or its algorithm is not supported.
    pub fn certified(&self, provider: &CryptoProvider) -> Result<CertifiedKey, rustls::Error> {
        let Some(leaf) = self.chain.first().filter(|leaf| go_chain::is_version_1(leaf)) else {
            return CertifiedKey::from_der(self.chain.clone(), self.key.clone_key(), provider);
        };
        // The TLS library cannot compare this certificate with a key.
        let key = provider.key_provider.load_private_key(self.key.clone_key())?;
        let expected = go_chain::public_key(leaf)?;
        if key.public_key().is_some_and(|found| found != expected) {
            return Err(InconsistentKeys::KeyMismatch.into());
        }
        Ok(CertifiedKey::new(self.chain.clone(), key))
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

/// Reads every certificate of a PEM file.
///
/// # Errors
/// When the file cannot be read, has a malformed block, or holds no certificate.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    parse_chain(path, &read(path)?)
}

/// Parses every certificate of a PEM text; the path is named in errors.
///
/// # Errors
/// When it has a malformed block, or holds no certificate.
pub fn parse_chain(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let malformed = |reason: String| TlsError::Pem { path: path.into(), reason };
    let chain = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| malformed(pem_fault(&error, "certificate")))?;
    if chain.is_empty() {
        return Err(malformed(pem_fault_of(&pem::Error::NoItemsFound, "certificate", pem)));
    }
    Ok(chain)
}

/// The trust store of these CA certificates.
///
/// # Errors
/// When one of them cannot be a trust anchor.
pub fn authorities(
    certificates: &[CertificateDer<'static>],
) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).map_err(|error| TlsError::Authority(error.to_string()))?;
    }
    Ok(Arc::new(roots))
}

/// The CA certificates of a PEM file, without the blocks that cannot be used.
#[derive(Debug)]
pub struct Authorities {
    /// The trust store; never empty.
    pub roots: RootCertStore,
    /// The certificates in the trust store.
    pub certificates: Vec<CertificateDer<'static>>,
    /// A line for each block that was left out.
    pub left_out: Vec<String>,
}

impl Authorities {
    /// Parses a CA file; the path is named in errors.
    ///
    /// # Errors
    /// When no block of it is a CA certificate that can be used.
    pub fn from_pem(path: &Path, pem: &[u8]) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        let (mut certificates, mut left_out) = (Vec::new(), Vec::new());
        let blocks = <(SectionKind, Vec<u8>)>::pem_slice_iter(pem);
        for (number, block) in (1..).zip(blocks) {
            let added = match block {
                Ok((SectionKind::Certificate, der)) => {
                    let certificate = CertificateDer::from(der);
                    let added = roots.add(certificate.clone()).map_err(|error| error.to_string());
                    added.map(|()| certificates.push(certificate))
                }
                // As in Go, other blocks are no fault.
                Ok(_) => Ok(()),
                Err(error) => Err(pem_fault(&error, "certificate")),
            };
            if let Err(reason) = added {
                left_out.push(format!("block {number}: {reason}"));
            }
        }
        if certificates.is_empty() {
            let reason = match left_out.first() {
                None => pem_fault_of(&pem::Error::NoItemsFound, "certificate", pem),
                Some(first) => format!("holds no certificate that can be used; {first}"),
            };
            return Err(TlsError::Pem { path: path.into(), reason });
        }
        Ok(Self { roots, certificates, left_out })
    }

    /// Reads a CA file.
    ///
    /// # Errors
    /// When it cannot be read, or no block of it is a CA certificate that can be used.
    pub fn from_pem_file(path: &Path) -> Result<Self, TlsError> {
        Self::from_pem(path, &read(path)?)
    }
}

/// The first of the files in which distributions keep the CA certificates (Go's `crypto/x509`).
pub fn system_authorities() -> Option<PathBuf> {
    const FILES: [&str; 6] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/pki/tls/cacert.pem",
        "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    FILES.iter().map(PathBuf::from).find(|file| file.exists())
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn authority() -> String {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
    }

    #[test]
    fn a_block_of_a_ca_file_that_cannot_be_used_is_left_out() {
        let not_base64 = "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n";
        let not_der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let key = KeyPair::generate().unwrap().serialize_pem();
        let pem = [&authority(), not_base64, &key, not_der, &authority()].concat();
        let path = Path::new("ca.crt");
        let found = Authorities::from_pem(path, pem.as_bytes()).unwrap();
        assert_eq!((found.roots.len(), found.certificates.len()), (2, 2));
        assert_eq!(found.left_out.len(), 2, "{:?}", found.left_out);
        assert!(found.left_out[0].starts_with("block 2: "), "{:?}", found.left_out);
        assert!(found.left_out[1].starts_with("block 4: "), "{:?}", found.left_out);
        for (pem, reason) in [
            (key, "ca.crt: holds no certificate"),
            (not_der.into(), "ca.crt: holds no certificate that can be used; block 1: "),
            (String::new(), "ca.crt: holds no certificate"),
        ] {
            let error = Authorities::from_pem(path, pem.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(reason), "{error}");
        }
    }

    #[test]
    fn faults_of_pem_are_texts_without_lists_of_bytes() {
        let path = Path::new("a.crt");
        let fault = |pem: &str| parse_chain(path, pem.as_bytes()).unwrap_err().to_string();
        let cut = &authority()[..60];
        assert_eq!(fault(cut), "a.crt: the block CERTIFICATE has no end, the file is cut off");
        let begin = "a.crt: a line BEGIN does not end in five hyphens, or line breaks are missing";
        assert_eq!(fault("-----BEGIN CERTIFICATE\n"), begin);
    }

    #[test]
    fn a_file_of_another_kind_is_named_as_what_it_is() {
        let path = Path::new("a.pem");
        let (chain, key) = (authority(), KeyPair::generate().unwrap().serialize_pem());
        let fault = |chain: &str, key: &str| {
            let pair = Identity::from_pem((path, chain.as_bytes()), (path, key.as_bytes()));
            pair.unwrap_err().to_string()
        };
        let encrypted =
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----";
        let older = "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n\
                     AAAA\n-----END EC PRIVATE KEY-----";
        for (found, expected) in [
            (
                fault(&chain, &chain),
                "a.pem: holds no private key, but a certificate; are the files",
            ),
            (fault(&key, &key), "a.pem: holds no certificate, but a private key; are the files"),
            (fault(&chain, encrypted), "a.pem: holds no private key, but one with a password"),
            (fault(&chain, older), "a.pem: holds no private key, but one with a password"),
            (fault("", &key), "a.pem: holds no certificate; it is empty"),
            (fault("x", &key), "a.pem: holds no certificate; it must be PEM"),
        ] {
            assert!(found.starts_with(expected), "{found}");
        }
    }

    #[test]
    fn a_key_without_line_breaks_is_not_quoted() {
        let key = KeyPair::generate().unwrap().serialize_pem();
        let secret = key.lines().nth(1).unwrap();
        for pem in [key.replace('\n', ""), key.replace('\n', " "), key.replacen('\n', "", 1)] {
            let chain = authority();
            let path = Path::new("a.key");
            let pair = (Path::new("a.crt"), chain.as_bytes());
            let error = Identity::from_pem(pair, (path, pem.as_bytes())).unwrap_err().to_string();
            assert!(error.contains("line breaks are missing"), "{}", error.len());
            let as_bytes = format!("{:?}", secret.as_bytes());
            let as_bytes = as_bytes.trim_matches(['[', ']']);
            assert!(!error.contains(secret) && !error.contains(as_bytes));
        }
    }

    #[test]
    fn a_byte_order_mark_hides_no_certificate() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let two = [authority(), authority()].concat();
        std::fs::write(file.path(), format!("\u{feff}{two}")).unwrap();
        assert_eq!(certificates(file.path()).unwrap().len(), 2);
    }

    #[test]
    fn a_file_is_read_only_if_it_is_regular_and_not_too_large() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = File::create(&path).unwrap();
        file.set_len(MAX_FILE_BYTES).unwrap();
        assert_eq!(read_file(&path).unwrap().len() as u64, MAX_FILE_BYTES);
        file.set_len(MAX_FILE_BYTES + 1).unwrap();
        assert!(read_file(&path).unwrap_err().to_string().contains("larger than 4 MiB"));
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&pipe, folder.path()] {
            let error = read_file(path).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
    }
}
